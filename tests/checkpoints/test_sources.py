"""Every place a model may come from gives the same weights, and none of them can run code."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.fetch import SMOLLM2, local_checkpoint
from nemo_pvs.checkpoints.files import pytorch_bin
from nemo_pvs.checkpoints.files.pytorch_bin import PytorchBinReader
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError

from .conftest import Bomb, assert_same

# --- pytorch_model.bin


@pytest.fixture(params=["1GB", "60KB"], ids=["one file", "many files"])
def bin_folder(request, make_tiny_llama, tmp_path):
    """A bf16 Llama as transformers saves it when told to write PyTorch files; the safetensors twin is in ``hf``."""
    make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bin", safe_serialization=False, max_shard_size=request.param)
    assert (len([*(tmp_path / "bin").glob("pytorch_model*.bin")]) > 3) == (request.param == "60KB")
    assert not [*(tmp_path / "bin").glob("*.safetensors")]
    return tmp_path / "bin"


def test_pytorch_files_are_read_like_safetensors(bin_folder, tmp_path):
    source, twin = HuggingFaceSource(bin_folder), HuggingFaceSource(tmp_path / "hf")
    assert_same(source, twin)
    assert fingerprint(source) == fingerprint(twin)
    there = convert(bin_folder, tmp_path / "nemo", to="nemo")
    assert there.tensors == convert(tmp_path / "hf", tmp_path / "twin", to="nemo").tensors


@pytest.mark.slow
def test_what_is_read_is_a_copy_whether_or_not_the_file_is_mapped_anew(bin_folder, tmp_path, monkeypatch):
    for limit in (0, 1 << 40):
        monkeypatch.setattr(pytorch_bin, "_MAPPED_BYTES", limit)
        source = HuggingFaceSource(bin_folder)
        for name in source._parts:
            source.read(name).zero_()
        assert_same(source, HuggingFaceSource(tmp_path / "hf"))


def test_safetensors_come_first(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert HuggingFaceSource(tmp_path).read("model.norm.weight").all()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight.all()  # transformers agrees
    (tmp_path / "model.safetensors").unlink()
    assert not HuggingFaceSource(tmp_path).read("model.norm.weight").any()


def test_views_and_shared_bytes_are_read_as_what_they_show(tmp_path):
    base = torch.arange(24.0)
    tensors = {"whole": base, "row": base[5:8], "transposed": base.reshape(4, 6).T, "repeated": base[:1].expand(3, 2)}
    torch.save({**tensors, "parameter": torch.nn.Parameter(base[2:4])}, tmp_path / "x.bin")
    reader = PytorchBinReader(tmp_path / "x.bin")
    for name, tensor in tensors.items():
        copy = reader.read(name)
        assert copy.is_contiguous()
        assert reader.size(name) == tuple(tensor.shape)
        assert torch.equal(copy, tensor)
    assert type(reader.read("parameter")) is torch.Tensor
    assert not reader.read("parameter").requires_grad


@pytest.mark.parametrize("where", ["value", "key", "extra"])
def test_a_bomb_in_a_pytorch_file_does_not_run(make_tiny_llama, tmp_path, where):
    make_tiny_llama(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    bomb = Bomb(tmp_path / "ran")
    (tmp_path / "hf" / "model.safetensors").unlink()
    content = {"value": {**tensors, "x": bomb}, "key": {(bomb,): 1}, "extra": bomb}[where]
    torch.save(content, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"asks for \w+\.system, which weights never need.* nothing of it was loaded"):
        convert(tmp_path / "hf", tmp_path / "out", to="nemo")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=False)  # the proof that it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "not a dictionary of tensors"),
        ({"a": torch.ones(2), "model": {"b": torch.ones(2)}}, "model in .* is not a tensor"),
        ({"a": Fraction(1, 2)}, "asks for fractions.Fraction"),
        ({"a": b"tensor"}, "a in .* is not a tensor"),
    ],
)
def test_a_pytorch_file_of_other_things_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        PytorchBinReader(tmp_path / "x.bin")


def test_a_broken_or_old_pytorch_file_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(UserError, match="missing"):
        PytorchBinReader(path)
    torch.save({"a": torch.ones(500)}, path)
    content = path.read_bytes()
    for keep in (4, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match=r"x\.bin is not a complete PyTorch file"):
            PytorchBinReader(path)
    for other in (b"", b"hello", b"\x80\x02."):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"x\.bin is not a file of PyTorch 1\.6 or later"):
            PytorchBinReader(path)
    torch.save({"a": torch.ones(500)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"x\.bin is not a file of PyTorch 1\.6 or later"):
        PytorchBinReader(path)


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.int8), torch.ones(2, 2).to_sparse()])
def test_quantised_and_sparse_pytorch_tensors_are_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="only dense floating-point weights"):
        PytorchBinReader(tmp_path / "x.bin").read("a")


# --- what is made into a folder first


def test_a_folder_is_its_own_local_checkpoint(hf):
    with local_checkpoint(str(hf)) as folder:
        assert folder == hf
    assert HuggingFaceSource(hf)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder_for_as_long_as_it_is_needed(tmp_path):
    leftover = tmp_path / ".out.source-0" / "huggingface"
    leftover.mkdir(parents=True)
    with local_checkpoint(SMOLLM2, next_to=tmp_path / "out") as folder:
        assert folder == leftover
        manifest = convert(folder, tmp_path / "out", to="nemo")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert manifest.tensors["model.embed_tokens.weight"].size == (49152, 576)


def test_a_broken_gguf_file_leaves_nothing(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(UserError, match=r"x\.gguf is not a readable GGUF file"),
        local_checkpoint(str(tmp_path / "x.gguf"), next_to=tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


HUB = """
import http.server, json, pathlib, sys
root = pathlib.Path(sys.argv[1])
asked = []

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/some/model"):
            names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
            about = {"id": "some/model", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in names]}
            tree = [{"type": "file", "path": n, "size": (root / n).stat().st_size, "oid": "1" * 40} for n in names]
            self.answer(json.dumps(tree if "/tree/" in path else about).encode())
        elif path == "/asked":
            self.answer(json.dumps(asked).encode())
        elif "/resolve/" in path and (root / path.split("1" * 40 + "/")[-1]).is_file():
            asked.append(path.split("1" * 40 + "/")[-1])
            self.answer((root / asked[-1]).read_bytes())
        else:
            self.send_response(404)
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, content):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), "ETag": f'"{len(content)}"',
                            "X-Repo-Commit": "1" * 40}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def hub(hf):
    """A server on this machine that answers as the Hugging Face hub does, with one model."""
    server = subprocess.Popen([sys.executable, "-c", HUB, str(hf)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    server.kill()
    server.wait()
    server.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("safetensors", [True, False])
def test_a_hub_id_is_downloaded_without_what_is_not_needed(python, hub, hf, tmp_path, safetensors):
    wanted = {path.name for path in hf.iterdir()} - {"README.md"}
    if safetensors:
        (hf / "pytorch_model.bin").write_bytes(b"the same again")
    else:
        torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
        (hf / "model.safetensors").unlink()
        wanted = {*wanted, "pytorch_model.bin"} - {"model.safetensors"}
    (hf / "original").mkdir()
    for extra in ("original/consolidated.00.pth", "original/tokenizer.model", "consolidated.safetensors", "run.py"):
        (hf / extra).write_bytes(b"not needed")
    script = (
        "from pathlib import Path; from nemo_pvs.checkpoints.fetch import local_checkpoint, prepare_parent;"
        "from nemo_pvs.checkpoints.open import open_source; from nemo_pvs.checkpoints.fingerprint import fingerprint\n"
        "with local_checkpoint('hf://some/model') as folder: print(fingerprint(open_source(folder)))\n"
        f"made = prepare_parent('hf://some/model@main', Path({str(tmp_path / 'made')!r}))\n"
        "print(fingerprint(open_source(made)))"
    )
    done = python("-c", script, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "cache"), HF_HUB_DISABLE_XET="1")
    assert done.code == 0, done.errors[-2000:]
    assert done.output.split() == [fingerprint(HuggingFaceSource(hf))] * 2
    assert {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*")} == wanted
    with urllib.request.urlopen(f"{hub}/asked") as answer:
        assert {*json.load(answer)} == wanted


@pytest.fixture
def ask_the_hub(python, tmp_path) -> Callable[..., str]:
    """Run a script with a cache of its own and return what it prints; of UserErrors it is one line each."""
    start = (
        "from pathlib import Path; from nemo_pvs.checkpoints.fetch import local_checkpoint, prepare_parent\n"
        "from nemo_pvs.checkpoints.open import open_source; from nemo_pvs.checkpoints.fingerprint import fingerprint\n"
        "from nemo_pvs.errors import UserError\n"
        "def attempt(model):\n"
        "    try: local_checkpoint(model).__enter__()\n"
        "    except UserError as error: print(error)\n"
    )
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

    def ask(script: str, **environment: str) -> str:
        done = python("-c", start + script, **cache, **environment)
        assert done.code == 0, done.errors[-2000:]
        return done.output

    return ask


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_sentence(ask_the_hub):
    said = ask_the_hub("attempt('hf://some/model')", HF_ENDPOINT="http://127.0.0.1:9")
    assert said == (
        "Cannot download some/model from the Hugging Face hub: it cannot be reached; check the network, or set "
        "HF_HUB_OFFLINE=1 to use what is in the cache.\n"
    )


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_sentence(ask_the_hub, hub, hf):
    said = ask_the_hub("attempt('hf://no/model'); attempt('hf://not a name')", HF_ENDPOINT=hub)
    lines = said.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Cannot download no/model from the Hugging Face hub: ")
    assert lines[1].endswith("that is not a valid repository name; write hf://owner/name.")
    (hf / "adapter_config.json").write_text("{}")
    (hf / "config.json").unlink()
    said = ask_the_hub("attempt('hf://some/model')", HF_ENDPOINT=hub)
    assert said.startswith("hf://some/model is a LoRA adapter, not a model; merge it into its base model with")


@pytest.mark.slow
def test_offline_the_cache_is_used_if_the_model_is_there(ask_the_hub, hub, hf, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    said = ask_the_hub("attempt('hf://some/model')", **nowhere)
    assert said == (
        "HF_HUB_OFFLINE is set, and some/model is not in the Hugging Face cache; unset it to download the model.\n"
    )
    script = (
        "with local_checkpoint('hf://some/model') as folder: print(fingerprint(open_source(folder)))\n"
        f"made = prepare_parent('hf://some/model', Path({str(tmp_path)!r}) / 'made')\n"
        "print(fingerprint(open_source(made)))"
    )
    ask_the_hub("attempt('hf://some/model')", HF_ENDPOINT=hub)
    said = ask_the_hub(script, **nowhere)
    assert said.split() == [fingerprint(HuggingFaceSource(hf))] * 2
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made == {path.name for path in hf.iterdir()} - {"README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())


# --- what travels with the weights


def test_tokenizer_templates_and_generation_config_come_along_both_ways(hf, tmp_path):
    (hf / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (hf / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (hf / "additional_chat_templates" / f"{name}.jinja").write_text(name + "{{ messages[0]['content'] }}")
    (hf / "chat_template.json").write_text('{"chat_template": "x"}')
    (hf / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [3, 4]}')
    convert(hf, tmp_path / "nemo", to="nemo")
    convert(tmp_path / "nemo", tmp_path / "back", to="hf")
    for folder in (tmp_path / "nemo" / "context" / "tokenizer", tmp_path / "back"):
        assert (folder / "additional_chat_templates" / "rag.jinja").read_text() == "rag{{ messages[0]['content'] }}"
    files = {str(path.relative_to(hf)) for path in hf.rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()} == {
        *files,
        "pvs_manifest.json",
    }
    for file in files - {"model.safetensors", "config.json"}:
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes(), file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.apply_chat_template([{"content": "w5"}], chat_template="rag", tokenize=False) == "ragw5"


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_a_tokenizer_that_transformers_5_saved_is_given_the_name_that_both_know(hf, tmp_path, to):
    path = hf / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "TokenizersBackend"}))
    convert(hf, tmp_path / "out", to=to)
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="TokenizersBackend"):
        AutoTokenizer.from_pretrained(hf)
    folder = tmp_path / "out" if to == "hf" else tmp_path / "out" / "context" / "tokenizer"
    assert AutoTokenizer.from_pretrained(folder)("w5 w7")["input_ids"] == [5, 7]
