"""What a run prepares on a tiny model: every stage before training, done again only where something has changed."""

import json
import random
from pathlib import Path

import pytest

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.data.shards import tokenize_files
from nemo_pvs.data.token_files import token_file_hash
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.ledger.flops import calibration_flops
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.pipeline.ledger import run_ledger
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.stages.calibrate import calibrations
from nemo_pvs.pipeline.stages.data import data
from nemo_pvs.pipeline.stages.evaluate import models_to_evaluate
from nemo_pvs.pipeline.stages.parent import parent
from nemo_pvs.pipeline.stages.prune import prune
from nemo_pvs.planning.charges import Spent
from nemo_pvs.planning.equal_terms import arm_cost, settle
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.depth_task import plan_task, scan_task
from nemo_pvs.recipe.load import load_recipe, parse_recipe
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.multiplications import multiplications


@pytest.fixture(name="values")
def values_fixture(tmp_path) -> dict:
    return tiny_values(tmp_path)


def tiny_values(folder: Path) -> dict:
    """Return a recipe for a tiny parent, a text that can be learned, a width and a depth target."""
    parent = save_tiny_tokenizer(make_tiny_llama(folder / "parent", tie_word_embeddings=True))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    corpus = folder / "corpus.jsonl"
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
        "evaluate": {"samples": 8, "sequence_length": 32, "tasks": ["continuation"], "task_limit": 8},
    }


def _records(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "stages").glob("*.json")}


@pytest.mark.slow
def test_prepare_only_stops_before_training(values, tmp_path):
    """And a target that differs in its training only takes what another was pruned to."""
    values["targets"]["width_too"] = {**values["targets"]["width"], "learning_rate": 1e-3, "arms": ["pruned"]}
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    jobs = pipeline.prepare_only()
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == pipeline.recipe, "the run cannot be repeated"
    arms = ["width-pruned", "width-random", "depth-pruned", "depth-random", "width_too-pruned"]
    assert [job.parent.name for job in jobs] == arms
    assert all(job.is_file() for job in jobs)
    assert not (tmp_path / "run" / "models").exists()
    job = json.loads(jobs[0].read_text())
    assert (Path(job["initial"]) / "weights" / ".metadata").is_file()
    one, other = (pipeline.pruned(name) / "huggingface" / "model.safetensors" for name in ("width", "width_too"))
    assert one.samefile(other)
    assert {path.name for path in (tmp_path / "run" / "random").iterdir()} == {"width", "depth"}


@pytest.mark.slow
def test_changed_settings_redo_what_depends_on_them_only(values, tmp_path):
    folder = tmp_path / "run"
    Pipeline(parse_recipe(values, "test"), folder).prepare()
    before = _records(folder)
    values["targets"]["width"]["ffn"] = 64
    Pipeline(parse_recipe(values, "test"), folder).prepare()
    changed = {name for name, time_ in _records(folder).items() if before[name] != time_}
    assert changed == {"prune-width.json", "random-width.json"}


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_and_nothing_trained_is_removed_unasked(values, tmp_path):
    folder = tmp_path / "run"
    Pipeline(parse_recipe(values, "test"), folder).prepare_only()
    checkpoint = folder / "train" / "width-pruned" / "nemo" / "checkpoints" / "step=7-last"
    checkpoint.mkdir(parents=True)
    values["targets"]["width"]["layout"] = {"data_parallel": 2}
    values["train"]["micro_batch_size"] = 2
    [job, *_] = Pipeline(parse_recipe(values, "test"), folder).prepare_only()
    assert json.loads(job.read_text())["layout"]["data_parallel"] == 2
    assert checkpoint.is_dir()
    values["train"]["weight_decay"] = 0.0
    with pytest.raises(UserError, match=r"made with training.weight_decay 0.1, not 0.0; .*--force train/width-pruned"):
        Pipeline(parse_recipe(values, "test"), folder).prepare_only()
    assert checkpoint.is_dir()
    Pipeline(parse_recipe(values, "test"), folder, force=("train/width-pruned",)).prepare_only()
    assert not checkpoint.exists()


def test_a_teacher_of_another_tokenizer_is_refused(values, tmp_path):
    teacher = save_tiny_tokenizer(make_tiny_llama(tmp_path / "teacher"), vocab=127)
    values["train"]["distill"] = {"teacher": str(teacher)}
    with pytest.raises(UserError, match="differ, first at token 127"):
        Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.slow
def test_forced_stage_is_done_again(values, tmp_path):
    folder = tmp_path / "run"
    Pipeline(parse_recipe(values, "test"), folder).prepare()
    before = _records(folder)
    Pipeline(parse_recipe(values, "test"), folder, force=("calibrate",)).prepare()
    changed = {name for name, time_ in _records(folder).items() if before[name] != time_}
    assert changed == {"calibrate.json"}, "the same scores need no new plans"


@pytest.mark.slow
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


@pytest.mark.slow
def test_any_method_makes_initial_weights_of_both_kinds(values, tmp_path):
    """Sparse: both arms have the same zeros. Uneven: the same layers, and biases. Dense: the parent itself."""
    values["targets"] = {
        "wanda": {"method": "wanda", "sparsity": "2:4", "layout": {"pipeline_parallel": 2}},
        "flap": {"method": "flap", "ratio": 0.3},
        "shortgpt": {"method": "shortgpt", "layers": 3},
        "dense": {"method": "dense"},
    }
    folder = tmp_path / "run"
    pipeline = Pipeline(parse_recipe(values, "test"), folder)
    pipeline.prepare()
    for name in values["targets"]:
        pruned, random_ = (open_source(pipeline.initial(name, kind)) for kind in ("pruned", "random"))
        assert shape_of(pruned) == shape_of(random_)
        assert fingerprint(pruned) == fingerprint(open_source(pipeline.pruned(name) / "huggingface"))
        assert fingerprint(pruned) != fingerprint(random_)
        if name == "wanda":
            for source in (pruned, random_):
                found = list(matrix_sparsity(source))
                assert {matrix.pattern for matrix in found} == {"2:4"}
                assert not any(matrix.disagreements for matrix in found)
            assert all(masks_of(pruned).read(one).equal(masks_of(random_).read(one)) for one in masks_of(pruned).names)
        if name == "flap":
            assert shape_of(pruned).uneven
            assert "mlp_bias" in shape_of(pruned).features
    assert fingerprint(open_source(pipeline.initial("dense", "pruned"))) == pipeline.records.parent.fingerprint
    assert not [path for path in (folder / "pruned").iterdir() if path.name.startswith(".")], "work is left behind"


@pytest.mark.slow
def test_layers_are_chosen_by_a_task_of_the_run_s_own_text(values, tmp_path):
    """As the scan that a user may do by hand, and charged with what it read."""
    values["targets"] = {"depth": {"method": "minitron-depth", "layers": 2, "task": "continuation", "task_limit": 6}}
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    pipeline.prepare()
    questions = tmp_path / "run" / "questions" / "depth" / "continuation"
    score = task_score(str(questions), pipeline.tokenizer, tmp_path)
    scan = scan_task(pipeline.parent_source, 2, score)
    assert Plan.load(pipeline.pruned("depth") / "plan.json").keep_layers == plan_task(scan).keep_layers
    spent = pipeline.records.pruned("depth").search
    assert spent == Spent(scan.tokens, scan.flops, scores=list(scan.scores))
    assert spent.tokens >= 4 * 6 * 4 * 32, "4 models, 6 questions with 4 endings after 32 tokens"
    pruned, _ = pipeline.recipe.runs
    ledger = run_ledger(pipeline, pruned, open_source(pipeline.initial("depth", "pruned")))
    assert ledger.total.tokens == 1e6 + spent.tokens + 2048
    before = _records(tmp_path / "run")
    Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()
    assert _records(tmp_path / "run") == before


def _token_files(values: dict, folder: Path) -> dict:
    """Tokenise the corpus of ``values``, and return a recipe for the token files."""
    tokenize_files(
        [values["data"]["source"]], Path(values["parent"]["source"]), folder, {"train": 0.6, "validation": 0.4}
    )
    files = {name: str(folder / name) for name in ("train", "validation")}
    files |= {"calibration": files["validation"], "test": files["validation"]}
    return {**values, "data": {"token_files": files}}


@pytest.mark.slow
def test_token_files_are_used_where_they_are(values, tmp_path):
    values = _token_files(values, tmp_path / "tokens")
    values["data"]["token_ranges"] = {"parent": [0, 1000], "pruned": [1000, 4000]}
    values["budgets"] = [1024, 2048]
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    jobs = [json.loads(job.read_text()) for job in pipeline.prepare_only()]
    assert {path.name for path in (tmp_path / "run" / "data").iterdir()} == {
        "index",
        "validation_windows.bin",
        "validation_windows.idx",
    }
    assert {job["data"]["train"][0] for job in jobs} == {str(tmp_path / "tokens" / "train")}
    assert [(job["name"], job["first_token"]) for job in jobs[:4]] == [
        ("width-pruned-1024", 1024),
        ("width-pruned-2048", 1024),
        ("width-random-1024", 0),
        ("width-random-2048", 0),
    ]
    read = TokensRead(token_file_hash(tmp_path / "tokens" / "train"), 1234, 32, 1024, 3072)
    assert pipeline.reads(pipeline.recipe.runs[1]) == read, "what pvs train on the trained model must not read again"
    values["data"]["token_ranges"] = {"random": [1e6, 2e6]}
    with pytest.raises(UserError, match=r"Training reads 1,002,\d+ tokens .* has"):
        Pipeline(parse_recipe(values, "test"), tmp_path / "other").prepare()
    manifest = tmp_path / "tokens" / "train.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    with pytest.raises(UserError, match="was made with another tokenizer"):
        Pipeline(parse_recipe(values, "test"), tmp_path / "other").prepare()


def test_a_parent_that_is_yet_to_be_trained(values, tmp_path):
    parent = Path(values["parent"]["source"])
    values["parent"] = {"config": json.loads((parent / "config.json").read_text()), "tokenizer": str(parent)}
    values |= {"targets": {"parent": {"method": "dense"}}, "arms": ["random"]}
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    (job,) = pipeline.prepare_only()
    assert job.parent.name == "parent-random"
    assert list(pipeline.records) == ["parent", "data", "random/parent"]
    drawn = open_source(pipeline.initial("parent", "random"))
    assert shape_of(drawn) == pipeline.parent_shape
    assert list(models_to_evaluate(pipeline)) == ["parent-random-initial", "parent-random"]


def test_a_config_of_another_parent_is_refused(values, tmp_path):
    config = json.loads((Path(values["parent"]["source"]) / "config.json").read_text())
    values["parent"]["config"] = {**config, "hidden_size": 32}
    with pytest.raises(UserError, match=r"parent\.config of the recipe is \[4 layers, hidden 32"):
        Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()


@pytest.mark.slow
def test_the_ledger_counts_what_was_computed(values, tmp_path):
    """Every product with a weight, counted by PyTorch; attention's scores, which it does not count, by hand."""
    scanned = {"method": "minitron-depth", "layers": 2}
    wanda = {"method": "wanda", "sparsity": "2:4"}
    values["targets"] = {
        "width": {"method": "minitron-width", "hidden": 32, "ffn": 48},
        "depth": scanned,
        "greedy": {**scanned, "search": "greedy", "protect_first": 1},
        "sleb": {**scanned, "layers": 3, "search": "sleb"},
        "one_by_one": {**scanned, "search": "individual"},
        "wanda": wanda,
        "wanda_at_once": {**wanda, "sequential": False},
        "flap": {"method": "flap", "ratio": 0.3},
        "magnitude": {"method": "magnitude", "sparsity": "2:4"},
    }
    values["parent"]["pretraining_tokens"] = 2048
    values["budgets"] = {"pruned": [512], "random": ["equal-total-tokens", "equal-total-flops"]}
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    pipeline.do(parent(pipeline))
    shape = pipeline.parent_shape
    pipeline.recipe = settle(pipeline.recipe, shape)
    pipeline.do(data(pipeline))
    layer, head = shape.matrix_parameters // 4, shape.vocab * shape.hidden
    attention = 2 * 32 * shape.heads * shape.head_dim

    assert multiplications(lambda: pipeline.do(calibrations(pipeline)[0])) == 256 * 4 * layer
    # Tokens, layers run, models measured: by hand for four layers. The last token of a sequence is only predicted.
    for name, models, forwards in (
        ("depth", 4, 4 + 2 + 1 + 0),
        ("greedy", 6, (4 + 2 + 1 + 0) + (2 + 1 + 0)),
        ("sleb", 3, 4 + 2 + 1),
        ("one_by_one", 5, 4 + 3 + 2 + 1 + 0),
    ):
        stage = prune(pipeline, name, pipeline.recipe.targets[name])
        counted = multiplications(lambda stage=stage: pipeline.do(stage))
        spent = pipeline.records.pruned(name).search
        assert spent.tokens == 4 * 32 * models
        assert spent.flops == 4 * 32 * (2 * (forwards * layer + models * head) + forwards * attention)
        assert counted * 32 == 4 * 32 * (forwards * layer + models * head) * 31
    for name, forwards, skipped in (("wanda", 4 + 3, 4), ("wanda_at_once", 4, 0)):
        stage = prune(pipeline, name, pipeline.recipe.targets[name])
        counted = multiplications(lambda stage=stage: pipeline.do(stage))
        spent = pipeline.records.pruned(name).calibration
        assert counted == 256 * (forwards * layer - skipped * shape.hidden * shape.ffn)
        assert spent == Spent(256, 2 * counted + 256 * forwards * attention)

    pipeline.prepare()
    arms = {arm.name: arm for arm in pipeline.recipe.runs}
    for name in values["targets"]:
        ledgers = {}
        for ending in ("pruned-512", "random-equal-total-tokens", "random-equal-total-flops"):
            arm = arms[f"{name}-{ending}"]
            model = open_source(pipeline.initial(name, arm.initialisation))
            ledgers[ending] = run_ledger(pipeline, arm, model)
            assert ledgers[ending] == arm_cost(pipeline.recipe, arm, shape_of(model), shape), (
                "a dry run says otherwise"
            )
        total, step = ledgers["pruned-512"].total, 4 * 32
        for kind, took in (
            ("tokens", ledgers["random-equal-total-tokens"].total.tokens),
            ("flops", ledgers["random-equal-total-flops"].total.flops),
        ):
            steps = arms[f"{name}-random-equal-total-{kind}"].training.steps
            assert getattr(total, kind) <= took < getattr(total, kind) + took / steps
        zeros = (
            sum(one.zeros for one in matrix_sparsity(model)) if name in ("wanda", "wanda_at_once", "magnitude") else 0
        )
        rate = shape_of(model).flops_per_token(sequence_length=32, training=True)
        assert ledgers["pruned-512"].training_zeros_skipped == (512, 512 * (rate - 6 * zeros))
        assert ledgers["pruned-512"].charges[-1].steps == 512 // step


@pytest.mark.slow
def test_a_target_by_gradients_is_calibrated_with_them(values, tmp_path):
    values["targets"] = {
        "taylor": {"method": "llm-pruner", "ratio": 0.5, "protect_first": 1, "metric": "param_mix"},
        "flap": {"method": "flap", "ratio": 0.3},
    }
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    pipeline.prepare()
    pruned = open_source(pipeline.pruned("taylor") / "nemo")
    whole, half = pipeline.parent_shape.layer_sizes[0], (48, 4, 1)
    assert shape_of(pruned).layer_sizes == (whole, half, half, half)
    for name, gradients in (("taylor", True), ("flap", False)):
        arm = next(arm for arm in pipeline.recipe.runs if arm.target == name and arm.initialisation == "pruned")
        model = open_source(pipeline.initial(name, arm.initialisation))
        (charge,) = [charge for charge in run_ledger(pipeline, arm, model).charges if charge.activity == "calibration"]
        assert charge.flops == calibration_flops(pipeline.parent_shape, charge.tokens, 32, gradients=gradients)


def test_unknown_stage_to_force(values, tmp_path):
    with pytest.raises(UserError, match="There is no stage calibrat to force"):
        Pipeline(parse_recipe(values, "test"), tmp_path, force=("calibrat",))
