"""Pruning, calibration and search at the command line: what a user types and sees."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import _refused


@pytest.mark.slow
@pytest.mark.parametrize("source_format", ["hf", "nemo"])
def test_prune_in_one_line(pvs, model, text, tmp_path, source_format):
    source = model
    if source_format == "nemo":
        source = tmp_path / "nemo"
        pvs("convert", model, source)
    settings = ("--data", text, "--samples", 4, "--sequence-length", 32)
    target = tmp_path / "small"
    code, out, errors = pvs(
        "prune", source, target, "--method", "minitron-width", "--target", "hidden=32,ffn=48", *settings
    )
    assert code == 0, errors
    assert "hidden 32" in out
    assert (target / ("config.json" if source_format == "hf" else "weights")).exists()
    assert json.loads((target / "pvs_plan.json").read_text())["method"] == "minitron-width"
    if source_format == "hf":
        assert AutoModelForCausalLM.from_pretrained(target).config.head_dim == 16


def test_scores_once_then_many_targets(pvs, model, text, tmp_path):
    settings = ("--data", text, "--samples", 4, "--sequence-length", 32)
    assert pvs("calibrate", model, "--out", tmp_path / "scores", *settings)[0] == 0
    for ffn in (48, 32):
        target = tmp_path / str(ffn)
        options = ("--method", "minitron-width", "--target", f"ffn={ffn}", "--scores", tmp_path / "scores")
        assert pvs("prune", model, target, *options)[0] == 0
        assert json.loads((target / "config.json").read_text())["intermediate_size"] == ffn


@pytest.mark.slow
def test_gradients_once_then_many_ratios(pvs, model, text, tmp_path):
    settings = ("--data", text, "--samples", 4, "--sequence-length", 32)
    for name, more in (("plain", []), ("gradients", ["--gradients"])):
        assert pvs("calibrate", model, "--out", tmp_path / name, *settings, *more)[0] == 0
    for ratio, metric in ((0.3, "param_first"), (0.5, "vectorize")):
        options = ("--method", "llm-pruner", "--ratio", ratio, "--metric", metric)
        target = tmp_path / metric
        assert pvs("prune", model, target, *options, "--scores", tmp_path / "gradients")[0] == 0
        assert json.loads((target / "config.json").read_text())["intermediate_size"] == int(96 * (1 - ratio))
    refused = pvs("prune", model, tmp_path / "small", *options, "--scores", tmp_path / "plain")
    _refused(refused, "measured without gradients; measure them again with pvs calibrate --gradients")
    calibrate = ("calibrate", model, "--out", tmp_path / "x", *settings, "--tensor-parallel", 2)
    _refused(pvs(*calibrate), "add --gradients, or leave them out")
    _refused(pvs(*calibrate, "--gradients"), "need a multiple of 2 ranks, not 1; start them with torchrun")


def test_prune_depth_says_which_layers(pvs, model, text, tmp_path):
    code, out, _ = pvs(
        "prune", model, tmp_path / "small", "--method", "minitron-depth", "--target", "layers=2", "--format", "nemo",
        "--data", text, "--samples", 4, "--sequence-length", 32,
    )  # fmt: skip
    assert code == 0
    assert "without layers" in out
    assert (tmp_path / "small" / "context" / "io.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("minitron-depth", ["--target", "layers=2", "--search", "greedy"]),
        ("shortgpt", ["--ratio", "0.5"]),
        ("minitron-width", ["--target", "hidden=32,ffn=48", "--aggregation", "meanabs_l2"]),
        ("minitron-joint", ["--target", "layers=3,ffn=64"]),
        ("flap", ["--ratio", "0.3", "--uneven", "pad"]),
        ("wanda-sp", ["--ratio", "0.3"]),
        ("magnitude-sp", ["--ratio", "0.3"]),
        ("llm-pruner", ["--ratio", "0.5", "--metric", "param_mix", "--protect-first", "1", "--uneven", "pad"]),
        ("magnitude", ["--sparsity", "2:4"]),
        ("wanda", ["--sparsity", "0.5"]),
        ("sparsegpt", ["--sparsity", "4:8"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_method_leaves_a_stock_model(pvs, model, text, tmp_path, method, options):
    small = tmp_path / "small"
    sizes = ["--data", text, "--samples", "4", "--sequence-length", "32"]
    code, _, errors = pvs("prune", model, small, "--method", method, *options, *sizes)
    assert code == 0, errors
    loaded = AutoModelForCausalLM.from_pretrained(small)
    sparse = "--sparsity" in options
    assert (small / "masks.safetensors").exists() == sparse
    dense = AutoModelForCausalLM.from_pretrained(model)
    if not sparse and "pad" not in options:
        assert loaded.num_parameters() < dense.num_parameters()
    assert not list(tmp_path.glob(".*")), "a work folder was left behind"


@pytest.mark.slow
def test_options_of_another_method_are_refused(pvs, model, tmp_path):
    _refused(pvs("prune", model, tmp_path / "x", "--method", "wanda", "--ratio", "0.5"), "wanda has no --ratio")
    _refused(pvs("prune", model, tmp_path / "x", "--method", "flap"), "give --ratio")
    for method in ("sheared-llama", "efficient-llm"):
        asked = ("prune", model, tmp_path / "x", "--method", method, "--ratio", "0.5")
        _refused(pvs(*asked), f"{method} trains the model while it finds out what to keep; write a recipe")
    _refused(pvs("prune", model, tmp_path / "x", "--method", "wanda", "--sparsity", "3:2"), "3:2")
    assert not (tmp_path / "x").exists()


def test_a_search_writes_a_target_that_prune_takes(pvs, model, text, tmp_path):
    data = ["--data", text, "--samples", "4", "--sequence-length", "32"]
    assert pvs("calibrate", model, "--out", tmp_path / "scores", *data)[0] == 0
    best = tmp_path / "best.json"
    grid = ["--hidden-step", "16", "--ffn-step", "32", "--layers-step", "1", "--heads-step", "2", "--tolerance", "0.2"]
    code, said, errors = pvs(
        "search", model, "--scores", tmp_path / "scores", "--out", best, "--parameters", "100e3", *grid
    )
    assert code == 0, errors
    assert "shapes within the budget" in said
    assert json.loads(best.read_text())["heads"] in (6, 8)
    arguments = ["--method", "minitron-joint", "--target", best, "--scores", tmp_path / "scores"]
    code, _, errors = pvs("prune", model, tmp_path / "small", *arguments)
    assert code == 0, errors
    models = len(json.loads(best.with_suffix(".search.json").read_text())["loss"])
    charged = json.loads((tmp_path / "small" / "ledger.json").read_text())["charges"]
    assert [(one["activity"], one["tokens"]) for one in charged[1:]] == [
        ("calibration", 128),
        ("search", models * 128),
    ]


@pytest.mark.slow
def test_a_search_within_a_measured_latency(pvs, model, text, tmp_path):
    data = ["--data", text, "--samples", "4", "--sequence-length", "32"]
    assert pvs("calibrate", model, "--out", tmp_path / "scores", *data)[0] == 0
    table, best = tmp_path / "table.json", tmp_path / "best.json"
    sizes = ("--context", "16", "--layers-step", "1", "--hidden-step", "0", "--ffn-step", "32")
    sizes = (*sizes, "--max-depth-pruning", "0.5")
    search = ("search", model, "--scores", tmp_path / "scores", "--on", "cpu", "--latency-table", table, *sizes)
    code, said, errors = pvs(*search, "--out", best, "--latency", "1000s")
    assert code == 0, errors
    for column in (
        "parameters (M)",
        "memory (GB)",
        "GFLOPs/token",
        "ms/token",
        "first token (ms)",
        "loss (nats/token)",
    ):
        assert column in said
    assert "5 shapes within the budget" in said
    assert re.search(
        r"whole models of the first 3 take [\d.]+, [\d.]+, [\d.]+ ms/token, a mean error of [\d.]+%", said
    )
    measured = json.loads(table.read_text())
    assert len(measured["decode"]) == len(measured["first_token"]) == 4, "attention, two MLPs, head"
    assert len(measured["models"]) == 3

    # As the table has it, only two layers with the narrow MLP are fast enough.
    mlp = "mlp hidden=64,ffn="
    times = {f"{mlp}64": 1e-3, f"{mlp}96": 2e-3, "head hidden=64,vocab=128": 1e-3}
    times["attention hidden=64,heads=8,kv_groups=2"] = 1e-3
    table.write_text(
        json.dumps({**measured, "machine": {"device": "laptop"}, "decode": times, "first_token": {}, "models": {}})
    )
    narrow = tmp_path / "narrow.json"
    code, said, errors = pvs(*search, "--out", narrow, "--latency", "5ms")
    assert code == 0, errors
    assert "1 shapes within the budget" in said
    assert " 5.00 " in said
    assert "no whole model was measured" in said
    found = json.loads(narrow.read_text())
    assert (found["layers"], found["ffn"]) == (2, 64)
    before = sorted(tmp_path.iterdir())
    _refused(
        pvs(*search, "--out", tmp_path / "none.json", "--latency", "4.9 ms"),
        "None of the 5 shapes decodes a token in 4.9 ms; the fastest takes 5 ms: layers=2,hidden=64,ffn=64",
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_latency_that_cannot_be_measured_is_refused(pvs, model, text, tmp_path):
    data = ["--data", text, "--samples", "4", "--sequence-length", "32"]
    assert pvs("calibrate", model, "--out", tmp_path / "scores", *data)[0] == 0
    search = ("search", model, "--scores", tmp_path / "scores", "--out", tmp_path / "best.json")
    before = sorted(tmp_path.iterdir())
    limit = (*search, "--latency", "5ms")
    _refused(pvs(*search), "give --parameters, --memory, --flops-per-token or --latency")
    _refused(pvs(*limit, "--on", "cuda"), "--on is cuda, but PyTorch sees no GPU here; choose cpu.")
    _refused(pvs(*limit, "--on", "tpu"), "--on is 'tpu'; choose cpu or cuda.")
    _refused(pvs(*limit, "--dtype", "int8"), "--dtype is 'int8'; choose bf16, fp16 or fp32.")
    _refused(pvs(*limit), "whose max_position_embeddings is 256; choose a smaller --context.")
    _refused(pvs(*limit, "--batch", 0), "needs numbers above 0")
    for option, value in (("--on", "cpu"), ("--dtype", "fp32"), ("--latency-table", "x.json")):
        _refused(pvs(*search, "--parameters", "1e5", option, value), f"{option} says how latency is measured; give")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_layers_chosen_by_a_task(pvs, model, tmp_path):
    tasks = Path(__file__).parents[1] / "evaluation" / "tasks"
    target = ("--method", "minitron-depth", "--target", "layers=3")
    code, said, errors = pvs("prune", model, tmp_path / "small", *target, "--task", tasks, "--task-limit", 4)
    assert code == 0, errors
    assert "the best shorter model scores" in said
    plan = json.loads((tmp_path / "small" / "pvs_plan.json").read_text())["provenance"]
    assert plan["settings"]["by"] == "task"
    assert len(plan["scores"]) == 4
    _refused(
        pvs("prune", model, tmp_path / "x", *target, "--task", "no_such_task"), "lm-eval has no task no_such_task"
    )
    _refused(pvs("prune", model, tmp_path / "x", *target, "--task", tasks, "--search", "greedy"), "leave --search out")


def test_little_memory_for_activations_changes_nothing(pvs, model, text, tmp_path):
    sizes = ("--data", text, "--samples", "4", "--sequence-length", "32")
    assert pvs("calibrate", model, "--out", tmp_path / "much", *sizes)[0] == 0
    assert pvs("calibrate", model, "--out", tmp_path / "little", *sizes, "--activation-memory", "10KB")[0] == 0
    much, little = (load_file(tmp_path / name / "scores.safetensors") for name in ("much", "little"))
    for name, tensor in much.items():
        torch.testing.assert_close(little[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    _refused(pvs("calibrate", model, "--out", tmp_path / "x", "--activation-memory", "much"), "--activation-memory is")


def test_a_gpu_that_is_not_there_is_refused(pvs, model, tmp_path):
    outcome = pvs("prune", model, tmp_path / "x", "--method", "flap", "--ratio", "0.2", "--device", "cuda")
    _refused(outcome, "PyTorch sees no GPU here")
