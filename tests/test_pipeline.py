"""A whole run on a tiny model: every stage, killed at its worst moment, loses nothing that was finished."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nemo_pvs.errors import UserError
from nemo_pvs.pipeline import Pipeline
from nemo_pvs.recipe import load_recipe, parse_recipe
from nemo_pvs.reporting.assemble import assemble
from nemo_pvs.reporting.html import write_report
from nemo_pvs.reporting.results import Results
from nemo_pvs.stages import Stages
from nemo_pvs.training import metrics
from nemo_pvs.training.job import METRICS_FILE
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.parallel.ranks import fork_context

STAGES_BEFORE_TRAINING = ["parent", "data", "calibrate", "prune/width", "random/width", "prune/depth", "random/depth"]


@pytest.fixture
def values(tmp_path) -> dict:
    """A recipe for a tiny parent, a text that can be learned, a width and a depth target."""
    parent = save_tiny_tokenizer(make_tiny_llama(tmp_path / "parent", tie_word_embeddings=True))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": " ".join(words[index % 61 :] + words * 5)}) for index in range(60)]
    corpus.write_text("\n".join(lines))
    return {
        "name": "tiny",
        "title": "A tiny run",
        "parent": {"source": str(parent), "pretraining_tokens": 1e6},
        "data": {
            "source": str(corpus),
            "split": {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1},
        },
        "calibrate": {"samples": 8, "sequence_length": 32, "scan_samples": 4},
        "targets": {
            "width": {
                "method": "minitron-width",
                "hidden": 32,
                "ffn": 48,
                "layout": {"tensor_parallel": 2},
            },
            "depth": {"method": "minitron-depth", "layers": 2, "layout": {"pipeline_parallel": 2}},
        },
        "train": {
            "tokens": 2048,
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "validations": 4,
            "validation_samples": 8,
        },
        "evaluate": {"samples": 8, "sequence_length": 32},
    }


class KilledAfter(Stages):
    """Dies by kill -9 when a stage has done its work and is about to say so: the worst moment."""

    def __init__(self, folder: Path, stage: str) -> None:
        super().__init__(folder)
        self.stage = stage

    def run(self, name, inputs, outputs, work, **options):
        def doomed():
            work()
            os.kill(os.getpid(), signal.SIGKILL)

        return super().run(name, inputs, outputs, doomed if name == self.stage else work, **options)


def _run(values: dict, folder: Path, doomed_stage: str | None = None) -> None:
    pipeline = Pipeline(parse_recipe(values, "test"), folder)
    if doomed_stage:
        pipeline.stages = KilledAfter(folder, doomed_stage)
    pipeline.run()


def _in_child(*arguments):
    """Start a run in a process of its own, and return the process."""
    child = fork_context().Process(target=_run, args=arguments)
    child.start()
    return child


def _records(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "stages").glob("*.json")}


@pytest.mark.parallel
@pytest.mark.slow
def test_kill_9_in_each_stage_loses_no_finished_stage(values, tmp_path):
    folder = tmp_path / "run"
    finished: dict[str, int] = {}
    for stage in [*STAGES_BEFORE_TRAINING, "evaluate/depth-random"]:
        if stage.startswith("evaluate"):
            _kill_in_the_middle_of_training(values, folder)
            finished = _records(folder) | finished
            finished = {name: time_ for name, time_ in finished.items() if not name.endswith(".begun.json")}
        child = _in_child(values, folder, stage)
        child.join(timeout=300)
        assert child.exitcode == -signal.SIGKILL, stage
        records = _records(folder)
        assert f"{stage.replace('/', '-')}.json" not in records, "a stage that was killed counts as done"
        assert finished.items() <= records.items(), f"killed in {stage}: a finished stage was done again"
        finished = {name: time_ for name, time_ in records.items() if not name.endswith(".begun.json")}

    pipeline = Pipeline(parse_recipe(values, "test"), folder)
    pipeline.run()
    assert finished.items() <= _records(folder).items()
    results = assemble(pipeline)
    write_report(results, folder)
    _check(results, folder, values)


def _kill_in_the_middle_of_training(values: dict, folder: Path) -> None:
    """Kill the run when the first arm has saved its checkpoint of step 8 and gone on; nothing may train on."""
    curve = folder / "train" / "width-pruned" / METRICS_FILE
    child = _in_child(values, folder)
    deadline = time.monotonic() + 240
    while not [point for point in metrics.read(curve).training if point["step"] >= 9]:
        assert time.monotonic() < deadline, "training did not get to step 9"
        time.sleep(0.02)
    child.kill()
    child.join()
    time.sleep(1)
    size = curve.stat().st_size
    time.sleep(2)
    assert curve.stat().st_size == size, "ranks train on without their parent"


def _check(results: Results, folder: Path, values: dict) -> None:
    """Every arm is measured at the same tokens, its model loads in transformers, and the report is there."""
    assert [arm.name for arm in results.arms] == ["width, pruned", "width, random", "depth, pruned", "depth, random"]
    for arm in results.arms:
        assert [point.tokens for point in arm.validation] == [0, 512, 1024, 1536, 2048]
        assert arm.validation[-1].loss < arm.validation[0].loss
        assert arm.ledger.training.tokens == 2048
    log = (folder / "train" / "width-pruned" / "log.txt").read_text()
    assert log.count("step 8/16  tokens") == 1, "the killed arm began anew instead of at its checkpoint"
    width = AutoModelForCausalLM.from_pretrained(folder / "models" / "width-pruned")
    assert (width.config.hidden_size, width.config.intermediate_size, width.config.head_dim) == (32, 48, 16)
    depth = AutoModelForCausalLM.from_pretrained(folder / "models" / "depth-random")
    assert depth.config.num_hidden_layers == 2
    assert "<svg" in (folder / "report.html").read_text()
    assert json.loads((folder / "results.json").read_text())["recipe"]["train"]["tokens"] == values["train"]["tokens"]


def test_prepare_only_stops_before_training(values, tmp_path):
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    jobs = pipeline.prepare_only()
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == pipeline.recipe, "the run cannot be repeated"
    assert [job.parent.name for job in jobs] == ["width-pruned", "width-random", "depth-pruned", "depth-random"]
    assert all(job.is_file() for job in jobs)
    assert not (tmp_path / "run" / "models").exists()
    job = json.loads(jobs[0].read_text())
    assert (Path(job["initial"]) / "weights" / ".metadata").is_file()


def test_changed_settings_redo_what_depends_on_them_only(values, tmp_path):
    folder = tmp_path / "run"
    Pipeline(parse_recipe(values, "test"), folder).prepare()
    before = _records(folder)
    values["targets"]["width"]["ffn"] = 64
    Pipeline(parse_recipe(values, "test"), folder).prepare()
    changed = {name for name, time_ in _records(folder).items() if before[name] != time_}
    assert changed == {"prune-width.json", "random-width.json"}


def test_forced_stage_is_done_again(values, tmp_path):
    folder = tmp_path / "run"
    Pipeline(parse_recipe(values, "test"), folder).prepare()
    before = _records(folder)
    Pipeline(parse_recipe(values, "test"), folder, force=("calibrate",)).prepare()
    changed = {name for name, time_ in _records(folder).items() if before[name] != time_}
    assert changed == {"calibrate.json"}, "the same scores need no new plans"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("targets.width.layout.tensor_parallel", 4, "Target width: Tensor parallelism 4 does not divide kv_groups=2"),
        ("targets.width.hidden", 128, "asks for hidden=128, but the model has 64"),
        ("targets.depth.layers", 3, "Target depth: Pipeline parallelism 2 does not divide 3 layers"),
        ("train.sequence_length", 4096, "the parent's context ends at 256"),
        ("train.tokens", 1e9, "the training split has"),
        ("train.validation_samples", 4000, "validation samples of 32 need"),
        ("parent.source", "no/such/model", "There is no model no/such/model"),
        ("data.source", "no/such/text", "no/such/text"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(values, tmp_path, path, value, sentence):
    *blocks, key = path.split(".")
    block = values
    for name in blocks:
        block = block[name]
    block[key] = value
    with pytest.raises(UserError, match=sentence) as raised:
        Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()
    assert "\n" not in str(raised.value)


def test_unknown_stage_to_force(values, tmp_path):
    with pytest.raises(UserError, match="There is no stage calibrat to force"):
        Pipeline(parse_recipe(values, "test"), tmp_path, force=("calibrat",))
