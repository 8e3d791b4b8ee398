"""The command line: what a user types, what they see, and what they are told when it cannot work."""

import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nemo_pvs
from nemo_pvs.cli.main import main
from tests.checkpoints.gguf_writer import write_gguf
from tests.checkpoints.test_gguf_model import llama as make_llama
from tests.conftest import make_tiny_llama, save_tiny_tokenizer


def _refused(outcome: tuple[int, str, str], sentence: str) -> None:
    """Exit code 2 and one clear sentence."""
    code, _, errors = outcome
    assert code == 2
    assert sentence in errors
    assert errors.startswith("pvs: ")
    assert errors.count("\n") == 1


def _listing_heavy_imports(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``pvs`` in a separate process, whose last line is the list of slow packages that it has imported."""
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


def test_a_terminal_without_a_character_gets_a_question_mark(monkeypatch):
    """As in a locale of ASCII or Latin-1; the results of an evaluation have ±."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["pvs", "--version"])
    monkeypatch.setattr(nemo_pvs, "__version__", "1.0 ± 0.1")
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    assert (end.value.code, output.getvalue()) == (0, b"1.0 ? 0.1\n")


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
def test_inspect_reads_a_gguf_file_where_it_is(pvs, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", make_llama())
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: pytest.fail("it writes a copy"))
    code, out, _ = pvs("inspect", file, "--verify")
    assert code == 0
    assert "gguf, family llama" in out
    assert f"{file}: every tensor could be read; there is no manifest to compare with" in out


def test_inspect_says_what_to_do_about_a_broken_manifest(pvs, model, tmp_path):
    pvs("convert", model, tmp_path / "nemo")
    assert "broken" not in pvs("inspect", tmp_path / "nemo")[1]
    (tmp_path / "nemo/context/io.json").write_text("{}")
    (code, out, _), verified = (pvs("inspect", tmp_path / "nemo", *option) for option in ((), ("--verify",)))
    assert code == 0
    assert "--verify names it" in out
    _refused(verified, "context/io.json")


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
        "or leave merge_heads out": ("prune", model, target, "--target", "ffn=48", "--merge-heads", *width),
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
    assert errors == "pvs: interrupted; run the same command again to continue.\n"
    assert not (tmp_path / "run" / "stages" / "parent.json").exists()


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
