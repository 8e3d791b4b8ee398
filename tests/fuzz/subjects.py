"""What is damaged: one entry a kind of input, by the name that ``python -m tests.fuzz`` takes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
import yaml
import zstandard

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.manifest import MANIFEST, Manifest
from nemo_pvs.data.tokenize import write_token_file
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.system.files import sha256_file
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.fuzz.damage import damage_file, damage_json, damaged_bytes, damaged_value
from tests.fuzz.harness import Subject

_TEXTS = [" ".join(f"w{2 + (7 * line + word) % 120}" for word in range(40)) for line in range(30)]
_SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 4}


# --- checkpoints


def _model(folder: Path, *, to: str = "hf", shard_bytes: int = 5_000_000_000) -> None:
    """Write a checkpoint as we do, with a manifest."""
    plain = save_tiny_tokenizer(make_tiny_llama(folder / "plain", **_SIZES))
    convert(plain, folder / "model", to=to, max_shard_bytes=shard_bytes, verify="none")  # type: ignore[arg-type]
    for path in (folder / "plain").iterdir():
        path.unlink()
    (folder / "plain").rmdir()


def _convert(random: Random, folder: Path, out: Path) -> list[object]:
    return ["convert", folder / "model", out, "--to", random.choice(["hf", "nemo"])]


def _same_weights(sound: Path, out: Path) -> None:
    expected, made = Manifest.read(sound / "model"), Manifest.read(out)
    assert expected is not None
    assert made is not None
    assert made.tensors == expected.tensors, "other weights than the manifest's"


def _damage_header(random: Random, folder: Path) -> None:
    """Damage the header of a safetensors file; its length still fits, mostly."""
    path = folder / "model" / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if random.random() < 0.4:
        path.write_bytes(damaged_bytes(random, content[:end]) + content[end:])
        return
    header = json.dumps(damaged_value(random, json.loads(content[8:end]))).encode()
    length = len(header) if random.random() < 0.9 else random.choice([0, 1, end, 2**31, 2**63, 2**64 - 1])
    path.write_bytes(length.to_bytes(8, "little") + header + content[end:])


def _damage_weights(random: Random, folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:end] + damaged_bytes(random, content[end:]))


def _damage_any_file(random: Random, folder: Path) -> None:
    """Damage one file of a checkpoint, by its values if it has JSON."""
    files = sorted(path for path in (folder / "model").rglob("*") if path.is_file() and path.name != MANIFEST)
    path = random.choice(files)
    (damage_json if path.suffix == ".json" else damage_file)(random, path)


def _json_in(name: str) -> Callable[[Random, Path], None]:
    return lambda random, folder: damage_json(random, folder / name)


# --- text


def _with_tokenizer(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_tiny_tokenizer(folder / "tokenizer")
        (folder / "text").mkdir()
        write(folder / "text")

    return make


def _lines() -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(_TEXTS)).encode()


def _zst(folder: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    (folder / "a.jsonl.zst").write_bytes(compressor.compress(_lines()))


def _parquet(folder: Path) -> None:
    table = pyarrow.table({"id": list(range(len(_TEXTS))), "text": _TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", write_page_checksum=True, row_group_size=10)


def _tokenize(random: Random, folder: Path, out: Path) -> list[object]:
    return ["tokenize", folder / "text", "--tokenizer", folder / "tokenizer", "--out", out, "--split", "train=1"]


@cache
def _sound_tokens(folder: Path) -> str:
    """Return the checksum of the tokens of all texts; the same for every format."""
    ids = [[*(int(word[1:]) for word in text.split()), 0] for text in _TEXTS]
    write_token_file(folder.parent / "expected", ids, vocab=128)
    return sha256_file(folder.parent / "expected.bin")


def _all_text(sound: Path, out: Path) -> None:
    assert sha256_file(out / "train.bin") == _sound_tokens(sound), "not the whole text"


def _damage_text(random: Random, folder: Path) -> None:
    (path,) = (folder / "text").iterdir()
    damage_file(random, path)


def _damage_tokenizer(random: Random, folder: Path) -> None:
    damage_json(random, random.choice(sorted((folder / "tokenizer").glob("*.json"))))


def _token_file(folder: Path) -> None:
    _model(folder)
    write_token_file(folder / "train", [[*(int(word[1:]) for word in text.split()), 0] for text in _TEXTS], vocab=128)
    (folder / "train.json").write_text(json.dumps({"tokenizer_sha256": "a", "bin_sha256": "b"}))


def _damage_token_file(random: Random, folder: Path) -> None:
    name = random.choice(["train.idx", "train.idx", "train.bin", "train.json"])
    (damage_json if name.endswith(".json") else damage_file)(random, folder / name)


def _calibrate(random: Random, folder: Path, out: Path) -> list[object]:
    windows = ["--samples", 2, "--sequence-length", 16]
    return ["calibrate", folder / "model", "--data", folder / "train.bin", *windows, "--out", out]


# --- recipes


def _recipe(folder: Path) -> None:
    _model(folder)
    values = load_recipe("smollm2_135m/demo").model_dump(exclude_none=True)
    values["parent"] = {"source": "model"}
    values["targets"] = {
        "width": {"method": "minitron-width", "hidden": 8, "ffn": 16, "layout": {"tensor_parallel": 2}},
        "depth": {"method": "minitron-depth", "layers": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def _damage_recipe(random: Random, folder: Path) -> None:
    path = folder / "recipe.yaml"
    if random.random() < 0.3:
        damage_file(random, path)
    else:
        path.write_text(yaml.safe_dump(damaged_value(random, yaml.safe_load(path.read_text()))))
    model = str(folder / "model")
    path.write_bytes(path.read_bytes().replace(b"source: model", b"source: " + model.encode()))


def _dry_run(random: Random, folder: Path, out: Path) -> list[object]:
    return ["run", folder / "recipe.yaml", "--dry-run", "--out", out]


SUBJECTS = {
    "config": Subject(_model, _json_in("model/config.json"), _convert, _same_weights),
    "index": Subject(
        lambda folder: _model(folder, shard_bytes=4000),
        _json_in("model/model.safetensors.index.json"),
        _convert,
        _same_weights,
    ),
    "header": Subject(_model, _damage_header, _convert, _same_weights),
    "weights": Subject(_model, _damage_weights, _convert, _same_weights),
    "manifest": Subject(_model, _json_in(f"model/{MANIFEST}"), _convert, _same_weights),
    "nemo": Subject(lambda folder: _model(folder, to="nemo"), _damage_any_file, _convert, _same_weights),
    "txt": Subject(
        _with_tokenizer(lambda folder: (folder / "a.txt").write_text("\n".join(_TEXTS)) and None),
        _damage_text,
        _tokenize,
    ),
    "jsonl": Subject(
        _with_tokenizer(lambda folder: (folder / "a.jsonl").write_bytes(_lines()) and None), _damage_text, _tokenize
    ),
    "gz": Subject(
        _with_tokenizer(lambda folder: (folder / "a.jsonl.gz").write_bytes(gzip.compress(_lines(), mtime=0)) and None),
        _damage_text,
        _tokenize,
        _all_text,
    ),
    "zst": Subject(_with_tokenizer(_zst), _damage_text, _tokenize, _all_text),
    "parquet": Subject(_with_tokenizer(_parquet), _damage_text, _tokenize, _all_text),
    "tokenizer": Subject(
        _with_tokenizer(lambda folder: (folder / "a.jsonl").write_bytes(_lines()) and None),
        _damage_tokenizer,
        _tokenize,
    ),
    "token_file": Subject(_token_file, _damage_token_file, _calibrate),
    "recipe": Subject(_recipe, _damage_recipe, _dry_run),
}
