"""Our recipes as NeMo's factories, and NeMo's own command on them: one process that has imported NeMo, in dry runs."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.cli.factory_names import factory_call, factory_name, prune_factory_name
from nemo_pvs.pruning.presets import target_presets
from nemo_pvs.pruning.registry import at_once
from nemo_pvs.recipe.load import load_recipe, packaged_recipes, parse_recipe
from nemo_pvs.recipe.series import is_one_run
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.documents import DOCUMENTS
from tests.megatron.ranks import fork_context, run_ranks

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

WIDTH = "pvs_llama31_8b_minitron_width(target=4b-width,init=pruned,tokens=50e9)"


def _in_nemo(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a process that is forked from one that has imported NeMo."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = fork_context().Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    failure, result = receiver.recv()
    process.join()
    assert failure is None, failure
    return result


def _call(sender: Any, function: Any, arguments: Any) -> None:
    import traceback

    try:
        sender.send((None, function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc()[-3000:], None))


def _dry_run(commands: list[list[str]], folder: Path) -> list[str]:
    """Return what ``nemo`` prints for each command, all run here in one process as the console script runs them."""
    import contextlib
    import io
    import os
    import sys

    from nemo_run.cli.api import create_cli

    os.chdir(folder)
    os.environ.update(NEMORUN_HOME=str(folder / "home"), COLUMNS="250", SLURM_ACCOUNT="physics")
    said = []
    for command in commands:
        sys.argv = ["nemo", *command]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            create_cli()(standalone_mode=False)
        said.append(output.getvalue())
    return said


def _fields(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every argument of a NeMo-Run config by its path, nested ones and lists taken apart."""
    if hasattr(value, "__arguments__"):
        yield key or "function", value.__fn_or_cls__.__name__
        for name, argument in value.__arguments__.items():
            yield from _fields(argument, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, argument in enumerate(value):
            yield from _fields(argument, f"{key}.{index}")
    elif isinstance(value, dict):
        for name, argument in value.items():
            yield from _fields(argument, f"{key}.{name}")
    else:
        yield key, str(value)


def _recipes() -> dict[str, dict[str, Any]]:
    """Return what matters of every factory that needs no prepared run: built by name, and as a cluster gets it."""
    import nemo_run as run
    import torch
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_factory
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from nemo_pvs.megatron.attention import FUSED_KERNELS
    from nemo_pvs.nemo_cli import factories

    factories.register()
    serializer = ZlibJSONSerializer()
    found = {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        for_cpus = recipe.parent.config is None or recipe.train.precision == "fp32"
        if for_cpus or not is_one_run(recipe):
            continue
        for arm in recipe.runs:
            call = factory_call(name, recipe, arm)
            made = parse_factory(llm.pretrain, "", llm.pretrain, call)
            text = serializer.serialize(made)  # comparing these takes a third of what ``==`` of the configs does
            sent = serializer.deserialize(text)
            assert serializer.serialize(sent) == text, "a cluster would get something else"
            assert made.__fn_or_cls__ is llm.pretrain
            assert isinstance(made.trainer.strategy, run.Config)
            config = made.model.config
            assert config.params_dtype == torch.bfloat16
            assert config.bf16
            assert made.trainer.accelerator == "gpu"
            assert made.trainer.devices * made.trainer.num_nodes == arm.layout.processes
            assert made.optim.config.use_distributed_optimizer
            assert made.trainer.strategy.ddp.overlap_grad_reduce
            assert made.trainer.strategy.ddp.overlap_param_gather
            # Transformer Engine's kernels are the defaults of NeMo's classes; nothing may have switched them off.
            assert not {*FUSED_KERNELS, "transformer_layer_spec", "data_step_fn"} & config.__arguments__.keys()
            found[call] = {
                "sizes": (config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_query_groups),
                "steps": made.trainer.max_steps,
                "callbacks": [callback.__fn_or_cls__.__name__ for callback in made.trainer.callbacks],
                "sparse": recipe.targets[arm.target].sparsity is not None,
                "fields": dict(_fields(made)),
            }
    return found


@pytest.fixture(scope="module")
def recipes() -> dict[str, dict[str, Any]]:
    return _in_nemo(_recipes)


def test_every_run_of_every_recipe_is_a_factory_of_its_shape(recipes):
    assert len(recipes) > 100
    shape = target_presets()["llama31_8b/4b-width"].target
    assert recipes[WIDTH]["sizes"] == (shape.layers, shape.hidden, shape.ffn, shape.kv_groups)
    assert recipes[WIDTH]["steps"] == 11921  # ceil(50e9 / (512 * 8192))
    for name, made in recipes.items():
        assert ("HoldMasks" in made["callbacks"]) == made["sparse"], name
        assert "SaveOnTimeOrSignal" in made["callbacks"]


PLACES = {
    "data.index_mapping_dir",
    "data.paths.validation.0",
    "data.paths.test.0",
    "data.tokenizer.pretrained_model_name",
    "log.ckpt.dirpath",
    "log.ckpt.initial",
    "log.log_dir",
    "log.tensorboard.save_dir",
    "resume.restore_config.path",
    "resume.resume_from_directory",
    "trainer.callbacks.0.path",
    "trainer.callbacks.0.job",
}
"""Where a run reads its initial weights, and writes."""
SIZES = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"}
BUDGET = {
    "log.ckpt.every_n_train_steps",
    "optim.lr_scheduler.max_steps",
    "optim.lr_scheduler.warmup_steps",
    "trainer.callbacks.0.total_steps",
    "trainer.max_steps",
    "trainer.val_check_interval",
}
PARALLEL = {"context_parallel_size"}


@pytest.mark.parametrize(
    ("one", "other", "documented"),
    [
        (WIDTH, WIDTH.replace("pruned", "random"), PLACES | {"data.first_sample"}),
        (
            "pvs_llama31_8b_p200",
            WIDTH.replace("pruned", "random"),
            PLACES
            | BUDGET
            | {f"model.config.{size}" for size in SIZES}
            | {f"trainer.strategy.{key}" for key in PARALLEL}
            | {"trainer.num_nodes"},
        ),
    ],
    ids=["retraining and scratch", "parent and scratch"],
)
def test_parent_retraining_and_scratch_differ_in_what_is_documented_only(recipes, one, other, documented):
    first, second = recipes[one]["fields"], recipes[other]["fields"]
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    for key in sorted(differing):
        print(f"{key}: {first.get(key)} | {second.get(key)}")
    assert differing, "the two are the same run"
    assert differing <= documented
    if documented == PLACES | {"data.first_sample"}:
        whole_steps_of_the_parent = 47684 * 512
        assert (first["data.first_sample"], second["data.first_sample"]) == (str(whole_steps_of_the_parent), "0")


def _fp8_and_pipeline() -> dict[str, Any]:
    from nemo_pvs.nemo_cli import factories
    from nemo_pvs.recipe.fields import Parallelism
    from nemo_pvs.training.machine import H100

    recipe = load_recipe("llama31_8b/minitron_depth")
    arm = recipe.runs[0]
    job = factories.Pipeline(recipe, Path("runs/x")).job(arm)
    training = arm.training.model_copy(update={"precision": "fp8"})
    layout = Parallelism(
        tensor_parallel=2,
        pipeline_parallel=2,
        virtual_pipeline=2,
        context_parallel=2,
        sequence_parallel=True,
        recompute="selective",
        micro_batch_size=2,
    )
    from dataclasses import replace

    described = factories._describe(recipe, arm, job)
    made = factories.pretrain_recipe(replace(job, training=training, layout=layout), H100, described)
    strategy = made.trainer.strategy
    return {
        "fp8": made.trainer.plugins.fp8,
        "gather": made.trainer.plugins.fp8_param_gather,
        "layout": (
            strategy.tensor_model_parallel_size,
            strategy.pipeline_model_parallel_size,
            strategy.virtual_pipeline_model_parallel_size,
            strategy.context_parallel_size,
        ),
        "overlap": [
            callback.tp_comm_overlap
            for callback in made.trainer.callbacks
            if callback.__fn_or_cls__.__name__ == "MegatronCommOverlapCallback"
        ],
        "ranks": made.trainer.devices * made.trainer.num_nodes,
        "recompute": (made.model.config.recompute_granularity, made.model.config.recompute_modules),
        "micro batch": made.data.micro_batch_size,
        "cross entropy": made.model.config.cross_entropy_fusion_impl,
        "average in collective": strategy.ddp.average_in_collective,
    }


def test_fp8_stages_and_overlap_for_h100():
    made = _in_nemo(_fp8_and_pipeline)
    assert made == {
        "fp8": "hybrid",
        "gather": False,
        "layout": (2, 2, 2, 2),
        "overlap": [False],  # not with FP8
        "ranks": 8,
        "recompute": ("selective", ["mlp"]),
        "micro batch": 2,
        "cross entropy": "te",
        "average in collective": True,
    }


def test_nemos_own_command_takes_our_factories_and_overrides(tmp_path):
    two_nodes = WIDTH.replace(")", ",num_nodes=2)")
    (tmp_path / "over.yaml").write_text(f"run:\n  factory: {two_nodes}\ntrainer:\n  max_steps: 9\n")
    override = "trainer.strategy.tensor_model_parallel_size=4"
    slurm = ["run.executor=pvs_slurm_h100", "run.executor.nodes=16"]
    verbs = ["pvs", "run", "recipe=smollm2_135m/demo", "dry_run=True", "launch=local_cpu", "--dryrun"]
    said = _in_nemo(
        _dry_run,
        [
            ["llm", "pretrain", "--factory", WIDTH, override, "--executor=pvs_slurm_h100", "--dryrun"],
            ["llm", "pretrain", "--factory", WIDTH.replace(")", ",num_nodes=4)"), "trainer.max_steps=7", "--dryrun"],
            ["llm", "pretrain", "--yaml", str(tmp_path / "over.yaml"), "--dryrun"],
            ["llm", "pretrain", "--factory", WIDTH, *slurm, "--dryrun"],
            ["llm", "pretrain", "--factory", WIDTH, "--to-yaml", str(tmp_path / "out.yaml")],
            *(
                ["llm", "prune", "--factory", prune_factory_name(name), "source=A", "target_folder=B", "--dryrun"]
                for name in at_once()
            ),
            verbs,
            ["llm", "pretrain", "--help"],
        ],
        tmp_path,
    )
    for text in said[:4]:
        assert "Dry run for pretrain" in text, text[-2000:]
    assert re.search(r"tensor_model_parallel_size\W+4", said[0])
    assert "SlurmExecutor" not in said[0], "NeMo-Run takes --executor now; say so in launch/README.md"
    assert "DP 32" in said[1]
    for value in ("SlurmExecutor", "account='physics'", "nodes=16,", "ntasks_per_node=8", "num_nodes=16"):
        assert value in said[3], value
    assert "hidden_size: 3072" in (tmp_path / "out.yaml").read_text()
    for method, text in zip(at_once(), said[5:], strict=False):
        assert "Dry run for prune" in text
        assert f"'{method}'" in text
    assert "Dry run for run" in said[-2]
    listed = re.findall(r"^│ (pvs_\w+)", said[-1], re.MULTILINE)  # NeMo-Run cuts what is too long for the terminal
    alone = [recipe for recipe in packaged_recipes() if is_one_run(load_recipe(recipe))]
    assert all(any(factory_name(recipe).startswith(name) for name in listed) for recipe in alone)
    assert len(alone) <= len(listed) < 40, "they hide NeMo's own"
    assert "llama3_8b" in said[-1]


def test_every_nemo_command_of_the_documents_is_a_dry_run_that_works(tmp_path):
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    lines = re.findall(r"^ *nemo ((?:llm|pvs) .*)$|`nemo (llm \w+ --factory [^`]*)`", text, re.MULTILINE)
    commands = [line or inline for line, inline in lines]
    commands = [command if "--dryrun" in command else f"{command} --dryrun" for command in commands]
    assert len(commands) >= 6
    for said in _in_nemo(_dry_run, [shlex.split(command, comments=True) for command in commands], tmp_path):
        assert "Dry run for" in said, said[-2000:]


def _prepare_and_train(recipe: Any, folder: Path) -> list[int]:
    import fiddle

    from nemo_pvs.nemo_cli import factories
    from nemo_pvs.pipeline.pipeline import Pipeline
    from nemo_pvs.training import metrics

    Pipeline(recipe, folder).prepare_only()
    made = factories.pretrain_arm(recipe, recipe.runs[0], folder=str(folder), machine="here")
    fiddle.build(made)()  # what NeMo-Run does with it
    return [point["step"] for point in metrics.read(folder / "train" / recipe.runs[0].name / "metrics.jsonl").training]


def test_a_factory_trains_what_was_prepared_on_this_machine(tmp_path):
    parent = save_tiny_tokenizer(make_tiny_llama(tmp_path / "parent"))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    lines = [json.dumps({"text": " ".join(words[index:] + words * 5)}) for index in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    values = {
        "name": "tiny",
        "title": "A tiny run",
        "parent": {"source": str(parent)},
        "data": {"source": str(tmp_path / "corpus.jsonl")},
        "targets": {"sparse": {"method": "magnitude", "sparsity": "2:4"}},
        "arms": ["pruned"],
        "train": {
            "tokens": 256,
            "sequence_length": 32,
            "global_batch_size": 4,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "validations": 1,
            "validation_samples": 4,
        },
        "calibrate": {"samples": 2, "sequence_length": 32},
        "evaluate": {"samples": 2, "sequence_length": 32},
    }
    assert run_ranks(1, _prepare_and_train, parse_recipe(values, "test"), tmp_path / "run") == [[1, 2]]
