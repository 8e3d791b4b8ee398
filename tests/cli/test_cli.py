"""The command line: what a user types, what they see, and what they are told when it cannot work."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_tiny_llama, save_tiny_tokenizer


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    generator = random.Random(0)
    for index in range(8):
        (folder / f"{index}.txt").write_text(" ".join(f"w{generator.randint(2, 127)}" for _ in range(400)))
    return folder


def _refused(outcome: tuple[int, str, str], sentence: str) -> None:
    """Exit code 2 and one clear sentence."""
    code, _, errors = outcome
    assert code == 2
    assert sentence in errors
    assert errors.startswith("pvs: ")
    assert errors.count("\n") == 1


def _listing_heavy_imports(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``pvs`` in a process of its own, whose last line is the list of slow packages that it has imported."""
    script = (
        "import atexit, sys, nemo_pvs.cli.main;"
        "heavy = {'torch', 'nemo', 'transformers', 'megatron', 'matplotlib', 'pandas'};"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)))); nemo_pvs.cli.main.main()"
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_help_is_light():
    done = _listing_heavy_imports("--help")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--method", "minitron-width", "--target", "hiden=3"), "did you mean hidden?"),
        (("--method", "minitron-widht", "--target", "hidden=3"), "--method is 'minitron-widht'; choose "),
        (("--method", "wanda", "--ratio", "0.5"), "wanda has no --ratio; its options are "),
    ],
)
def test_a_mistake_in_what_to_prune_is_reported_before_pytorch_is_imported(tmp_path, options, sentence):
    done = _listing_heavy_imports("prune", "smollm2-135m", tmp_path / "small", *options)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_every_verb_has_help(pvs):
    code, out, _ = pvs("--help")
    assert code == 0
    for verb in ("convert", "inspect", "calibrate", "prune", "train", "evaluate", "run", "report", "tokenize"):
        assert verb in out
        assert pvs(verb, "--help")[0] == 0


@pytest.mark.slow
def test_round_trip_through_nemo(pvs, model, tmp_path):
    assert pvs("convert", model, tmp_path / "nemo")[0] == 0
    code, out, _ = pvs("inspect", tmp_path / "nemo", "--tensors")
    assert code == 0
    assert "mlp.linear_fc1.weight" in out
    assert pvs("convert", tmp_path / "nemo", tmp_path / "back")[0] == 0
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, tmp_path / "back"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
def test_inspect_says_what_to_do_about_a_broken_manifest(pvs, model, tmp_path):
    pvs("convert", model, tmp_path / "nemo")
    assert "broken" not in pvs("inspect", tmp_path / "nemo")[1]
    (tmp_path / "nemo/context/io.json").write_text("{}")
    (code, out, _), verified = (pvs("inspect", tmp_path / "nemo", *option) for option in ((), ("--verify",)))
    assert code == 0
    assert "--verify names it" in out
    _refused(verified, "context/io.json")


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
    _refused(pvs(*calibrate), "add --gradients, or leave the parallelism out")
    _refused(pvs(*calibrate, "--gradients"), "need a multiple of 2 ranks, not 1; start them with torchrun")


def test_prune_depth_says_which_layers(pvs, model, text, tmp_path):
    code, out, _ = pvs(
        "prune", model, tmp_path / "small", "--method", "minitron-depth", "--target", "layers=2", "--format", "nemo",
        "--data", text, "--samples", 4, "--sequence-length", 32,
    )  # fmt: skip
    assert code == 0
    assert "without layers" in out
    assert (tmp_path / "small" / "context" / "io.json").exists()


def test_evaluate_agrees_on_both_formats(pvs, model, text, tmp_path):
    pvs("convert", model, tmp_path / "nemo")
    options = ("--perplexity", text, "--samples", 8, "--sequence-length", 64, "--out", tmp_path / "evaluation")
    code, _, errors = pvs("evaluate", model, tmp_path / "nemo", *options)
    assert code == 0, errors
    one, other = json.loads((tmp_path / "evaluation" / "results.json").read_text())["models"]
    assert one["measured"][f"perplexity/{text}/perplexity"]["tokens"] == 504
    values = [{name: about["value"] for name, about in model["measured"].items()} for model in (one, other)]
    assert values[0] == values[1]


def test_tokenize_splits_by_document(pvs, model, text, tmp_path):
    code, out, _ = pvs(
        "tokenize", text, "--tokenizer", model, "--out", tmp_path / "data", "--split", "train=0.75,validation=0.25"
    )
    assert code == 0
    assert (tmp_path / "data" / "train.idx").exists()
    assert "tokens" in out


@pytest.mark.slow
def test_mistakes_get_one_sentence_and_write_nothing(pvs, model, text, tmp_path):
    target = tmp_path / "target"
    width = ("--method", "minitron-width", "--data", text, "--samples", 4, "--sequence-length", 32)
    mistakes = {
        "no/such/model does not exist": ("convert", "no/such/model", target),
        "not a Hugging Face model": ("convert", text, target),
        "asks for hidden=4096, but the model has 64": ("prune", model, target, "--target", "hidden=4096", *width),
        "leaves 5 query heads in 2 KV groups, but every group keeps": (
            "prune", model, target, "--target", "heads=5", *width,
        ),
        "did you mean hidden?": ("prune", model, target, "--target", "hiden=32", *width),
        "Tensor parallelism 4 does not divide kv_groups=2": (
            "prune", model, target, "--target", "ffn=48", "--tensor-parallel", 4, *width,
        ),
        "--method is 'magic'; choose minitron-depth, shortgpt, minitron-width": (
            "prune", model, target, "--method", "magic", "--target", "ffn=48",
        ),
        "too few for 4 random windows of 100000": (
            "prune", model, target, "--target", "ffn=48", "--method", "minitron-width", "--data", text,
            "--samples", 4, "--sequence-length", 100000,
        ),
        "--to is 'onnx'; choose hf, nemo, megatron or gguf": ("convert", model, target, "--to", "onnx"),
        "does not end in .gguf; change one of them": ("convert", model, target, "--to", "gguf"),
        "the target's format is nemo; leave it out": ("convert", model, target, "--max-shard-size", "1GB"),
        "the target's format is gguf; leave it out": (
            "convert", model, target.with_suffix(".gguf"), "--pad-vocab-to-multiple", 8,
        ),
        "There is no recipe nothing": ("run", "nothing"),
        "--split is 'half'": ("tokenize", text, "--tokenizer", model, "--out", target, "--split", "half"),
    }  # fmt: skip
    for sentence, arguments in mistakes.items():
        _refused(pvs(*arguments), sentence)
        assert not target.exists(), sentence
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_existing_target_is_kept_unless_told_otherwise(pvs, model, tmp_path):
    pvs("convert", model, tmp_path / "nemo")
    before = (tmp_path / "nemo" / "pvs_manifest.json").stat().st_mtime_ns
    _refused(pvs("convert", model, tmp_path / "nemo"), "already exists")
    assert (tmp_path / "nemo" / "pvs_manifest.json").stat().st_mtime_ns == before
    assert pvs("convert", model, tmp_path / "nemo", "--overwrite")[0] == 0


def test_corrupt_weights(pvs, model, tmp_path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    _refused(pvs("convert", model, tmp_path / "nemo"), "model.safetensors")
    assert not (tmp_path / "nemo").exists()


def test_another_architecture(pvs, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    _refused(pvs("inspect", model), "No weight table for architecture MambaForCausalLM")


def test_full_disk(pvs, model, tmp_path):
    """A file system of 64 KiB that root may mount; elsewhere there is nothing to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("needs root to mount a small file system")
    try:
        for to in ("hf", "nemo"):
            _refused(pvs("convert", model, disk / to, "--to", to), "the disk is full")
            assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_interrupt_says_how_to_go_on(tmp_path):
    command = [str(Path(sys.executable).with_name("pvs")), "run", "smollm2_135m/demo", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = tmp_path / "run" / "stages" / "parent.begun.json"
    deadline = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "pvs: interrupted; the same command continues where it stopped.\n"
    assert not (tmp_path / "run" / "stages" / "parent.json").exists()


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


@pytest.mark.slow
def test_masks_and_shards_of_a_conversion(pvs, model, tmp_path):
    assert pvs("prune", model, tmp_path / "sparse", "--method", "magnitude", "--sparsity", "2:4")[0] == 0
    assert pvs("convert", tmp_path / "sparse", tmp_path / "nemo")[0] == 0
    code, _, errors = pvs("convert", tmp_path / "nemo", tmp_path / "hf", "--max-shard-size", "50KB", "--dtype", "fp32")
    assert code == 0, errors
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    code, said, _ = pvs("inspect", tmp_path / "hf", "--sparsity")
    assert code == 0
    assert said.count("50.00% pruned") == 4 * 7
    _refused(pvs("convert", tmp_path / "hf", tmp_path / "x", "--max-shard-size", "many"), "--max-shard-size is 'many'")
    _refused(pvs("convert", tmp_path / "hf", tmp_path / "x", "--verify", "maybe"), "choose checksum, logits or none")


SAME = " have equal logits on "


def _convert_and_compare(pvs, source, target, *more):
    code, said, errors = pvs("convert", source, target, "--verify", "logits", *more)
    assert code == 0, errors
    assert SAME in said
    return said


@pytest.mark.slow
def test_logits_are_compared_however_short_the_context(pvs, text, tmp_path):
    short = save_tiny_tokenizer(make_tiny_llama(tmp_path / "short", max_position_embeddings=24))
    assert "on 96 tokens" in _convert_and_compare(pvs, short, tmp_path / "nemo", "--text", text)
    assert "on 96 tokens" in _convert_and_compare(pvs, tmp_path / "nemo", tmp_path / "back", "--text", text)


@pytest.mark.slow
def test_logits_are_compared_on_random_tokens_without_a_tokenizer(pvs, tmp_path):
    model = make_tiny_llama(tmp_path / "model")
    said = _convert_and_compare(pvs, model, tmp_path / "nemo")
    assert "no tokenizer, so the logits are compared on random tokens" in said
    assert "on 1,024 tokens" in said
    _convert_and_compare(pvs, tmp_path / "nemo", tmp_path / "back")
    # A bare Megatron-LM folder finds its tokenizer beside the config, and here there is none.
    _convert_and_compare(pvs, tmp_path / "nemo" / "weights", tmp_path / "bare", "--config", model / "config.json")


def test_what_stops_a_comparison_of_logits_stops_it_before_the_work(pvs, text, tmp_path):
    small = save_tiny_tokenizer(make_tiny_llama(tmp_path / "small", vocab_size=100))
    logits = ["--verify", "logits", "--text"]
    refused = pvs("convert", small, tmp_path / "x", *logits, text)
    _refused(refused, "the model's vocabulary has 100 entries")
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    (tmp_path / "short.txt").write_text("w5 w7")
    _refused(pvs("convert", model, tmp_path / "x", *logits, tmp_path / "short.txt"), "has 2 tokens, too few")
    (model / "tokenizer.json").write_text("{")
    _refused(pvs("convert", model, tmp_path / "x", *logits, text), "cannot be loaded")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_separate_head_of_a_tied_config_is_converted(pvs, tmp_path):
    model = make_tiny_llama(tmp_path / "model")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    said = _convert_and_compare(pvs, model, tmp_path / "nemo")
    assert said.count("the head is kept and the model untied") == 1
    _convert_and_compare(pvs, tmp_path / "nemo", tmp_path / "back")
    head = load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, load_file(model / "model.safetensors")["lm_head.weight"])


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
