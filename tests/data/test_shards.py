from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from nemo_pvs.data import part_tokens, shards
from nemo_pvs.data.corpus import Document
from nemo_pvs.data.part_tokens import PartWriter
from nemo_pvs.data.shards import tokenize_files
from nemo_pvs.data.split import split_of
from nemo_pvs.data.tokenize import tokenize
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_bytes, sha256_json

from .conftest import SENTENCES, save_tokenizer_with_gap

SHARES = {"train": 0.8, "validation": 0.2}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five files of 40 documents; the first document is in two of them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(5):
        texts = [f"{number if index else 'copy'} {index} {SENTENCES[index % 3]}" for index in range(40)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _bytes_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called from a script without a main guard, which the workers do not run again."""
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("raise SystemExit('the script runs again')")
    monkeypatch.setitem(sys.modules, "__main__", script)
    made = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "one", SHARES, workers=1)
    again = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "two", SHARES, workers=2)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    assert made == again
    assert sum(manifest["documents"] for manifest in made.values()) == 200


def test_every_document_is_in_its_split_in_order(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    made = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, seed=3, workers=1)
    texts = [json.loads(line)["text"] for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for name, manifest in made.items():
        stored = IndexedDataset(str(tmp_path / "out" / name))
        expected = [text for text in texts if split_of(text, SHARES, 3) == name]
        rows = [stored[index] for index in range(len(stored))]
        assert [tokenizer.decode(row[:-1], clean_up_tokenization_spaces=False) for row in rows] == expected
        assert {int(row[-1]) for row in rows} == {tokenizer.eos_token_id}
        assert manifest["documents"] == len(expected)
        assert manifest["tokens"] == sum(map(len, rows))


def test_shares_are_met_on_average_and_copies_stay_together() -> None:
    names = [split_of(f"text {index}", SHARES, 0) for index in range(20_000)]
    assert names.count("train") / len(names) == pytest.approx(0.8, abs=0.01)
    assert split_of("text 1", SHARES, 0) == split_of("text 1", SHARES, 0)
    assert names != [split_of(f"text {index}", SHARES, 1) for index in range(20_000)]


def test_an_interrupted_run_goes_on_with_the_files_that_are_missing(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "whole", SHARES, workers=1)
    written: list[str] = []
    real = PartWriter.write

    def counted(writer, part, folder):
        if len(written) == 3 and part.file.name == "3.jsonl" and "stop" not in written:
            written.append("stop")
            raise KeyboardInterrupt
        written.append(part.file.name)
        real(writer, part, folder)

    monkeypatch.setattr(PartWriter, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert not list((tmp_path / "out").glob("*.bin"))
    assert tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1) == expected
    assert written == ["0.jsonl", "1.jsonl", "2.jsonl", "stop", "3.jsonl", "4.jsonl"]
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")

    assert tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1) == expected
    assert len(written) == 6, "a finished corpus was tokenised again"
    file = corpus / "2.jsonl"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert len(written) == 11, "a file that changed was not read again"


@pytest.mark.slow
def test_mistakes(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="add up to 1"):
        tokenize_files([str(corpus)], tokenizer_folder, out, {"train": 0.5})
    with pytest.raises(UserError, match="--workers is 0"):
        tokenize_files([str(corpus)], tokenizer_folder, out, SHARES, workers=0)
    for name in ("", "..", "a/b", ".hidden"):
        with pytest.raises(UserError, match=rf"The split '{name}' cannot be the name of a file"):
            tokenize_files([str(corpus)], tokenizer_folder, out, {name: 1.0})
    assert not out.exists()
    (corpus / "9.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"9\.jsonl, line 1, is not valid JSON"):
        tokenize_files([str(corpus)], tokenizer_folder, out, SHARES, workers=2)
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(UserError, match=r"The split .* got no document"):
        tokenize_files([str(tmp_path / "one.txt")], tokenizer_folder, tmp_path / "small", SHARES)


def test_what_is_no_text_is_left_out_and_said_once(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "plain", SHARES, workers=1)
    capsys.readouterr()
    (corpus / "README.txt").write_text("About this corpus.")
    for file in (corpus / "0.jsonl", corpus / "3.jsonl"):
        file.write_text(file.read_text() + '{"text": null}\n')
    made = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert [made[name]["bin_sha256"] for name in SHARES] == [expected[name]["bin_sha256"] for name in SHARES]
    assert capsys.readouterr().out == (
        f"{corpus}: not read as text: README.txt.\n2 documents without text were skipped.\n"
    )
    (corpus / "README.txt").write_text("It is another one now.")
    before = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == before, "a change of no text wrote everything again"


def test_token_files_are_what_megatron_itself_writes(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Each file in several parts, and the whole in two shards."""
    for number in (1, 2):
        assert not tokenize_files(
            [str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1, part_bytes=500, shard=(number, 2)
        )
    made = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1, part_bytes=500)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    files = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in sorted(corpus.iterdir())]
    for name, manifest in made.items():
        builder = IndexedDatasetBuilder(str(tmp_path / "expected.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
        for text in itertools.chain(*files):
            if split_of(text, SHARES, 0) == name:
                ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(tmp_path / "expected.idx"))
        for suffix in (".bin", ".idx"):
            expected = (tmp_path / f"expected{suffix}").read_bytes()
            assert (tmp_path / "out" / f"{name}{suffix}").read_bytes() == expected
        hashes = [sha256_bytes(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)) for texts in files]
        assert manifest["source_sha256"] == sha256_json(hashes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{name}{suffix}" for name in SHARES for suffix in (".bin", ".idx", ".json")
    )


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """By kill -9, with two workers, which end too."""
    expected = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "whole", SHARES, workers=1)
    command = (
        "from pathlib import Path\n"
        "import os, nemo_pvs.data.shards as shards\n"
        "def stop(done, total):\n"
        "    if done >= 10: os.kill(os.getpid(), 9)\n"
        f"shards.tokenize_files([{str(corpus)!r}], Path({str(tokenizer_folder)!r}), Path({str(tmp_path / 'out')!r}),"
        f" {SHARES!r}, workers=2, part_bytes=500, progress=stop)\n"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == -signal.SIGKILL
    parts = [path.name for path in (tmp_path / "out" / ".shards").iterdir() if not path.name.startswith(".")]
    assert len(parts) >= 10
    made = tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1, part_bytes=500)
    assert made == expected
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_parts_whose_removal_was_interrupted_are_removed_by_the_next_run(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take as much disk space as the tokens; parts of other settings are not finished and stay."""

    real = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if path.name == ".shards":
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    whole = _bytes_of_files(tmp_path / "out")
    assert len(list((tmp_path / "out" / ".shards").iterdir())) == 5
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, seed=1, workers=1, shard=(1, 2))
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert len(list((tmp_path / "out" / ".shards").iterdir())) == 3, "the parts of the other seed"
    shutil.rmtree(tmp_path / "out" / ".shards")
    assert _bytes_of_files(tmp_path / "out") == whole


def test_a_split_of_an_earlier_division_is_not_left_next_to_new_ones(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Its documents would be in the new training split, too."""
    three = {"train": 0.6, "validation": 0.2, "test": 0.2}
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", three, workers=1)
    before = _bytes_of_files(tmp_path / "out")
    with pytest.raises(UserError, match=r"test\.bin is a split of the same text that --split no longer names"):
        tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert _bytes_of_files(tmp_path / "out") == before
    for file in (tmp_path / "out").glob("test.*"):
        file.unlink()
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    (corpus / "0.jsonl").unlink()
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", {"less": 1.0}, workers=1)  # another text


def test_a_disk_that_is_full_when_parts_are_joined_is_not_left_full(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_index", full)
    with pytest.raises(UserError, match="the disk is full"):
        tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".shards"]


def test_shards_that_a_join_does_not_use_are_named(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another --split than theirs it would do all their work again without a word."""
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1, shard=(1, 2))
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1, shard=(2, 2))
    assert capsys.readouterr().out == ""
    tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", {"train": 0.7, "validation": 0.3}, workers=1)
    assert "has 5 parts of other text or with another tokenizer, --split" in capsys.readouterr().out


def test_a_document_too_long_for_megatrons_files_is_refused(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "1.jsonl").write_text(json.dumps({"text": SENTENCES[1] * 20}) + "\n")
    monkeypatch.setattr(part_tokens, "_MOST_TOKENS", 200)
    with pytest.raises(UserError, match=r"1\.jsonl has a document of [\d,]+ tokens \(1\.jsonl:1\)"):
        tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, workers=1)


def test_ids_beyond_the_number_of_tokens_are_stored(corpus: Path, tmp_path: Path) -> None:
    """A vocabulary with gaps; NumPy 1 stores the id 70,000 as the uint16 4,464 without a word."""
    folder = save_tokenizer_with_gap(tmp_path / "tokenizer", 70_000)
    made = tokenize_files([str(corpus)], folder, tmp_path / "out", {"train": 1.0}, workers=1)
    assert made["train"]["dtype"] == "int32"
    tokenize([Document(SENTENCES[0], "0")], folder, tmp_path / "one")
    for name in ("out/train", "one"):
        assert max(int(row.max()) for row in IndexedDataset(str(tmp_path / name))) == 70_000


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_that_is_none_is_refused(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, shard: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match=r"--shard is ./2; the first of 16"):
        tokenize_files([str(corpus)], tokenizer_folder, tmp_path / "out", SHARES, shard=shard)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "expected"), [("3", "tokenize a b --out c d --shard 3/16"), ("", "tokenize a b --out c d")]
)
def test_a_task_of_a_job_array_tokenises_its_share(tmp_path: Path, task: str, expected: str) -> None:
    pvs = tmp_path / "bin" / "pvs"
    pvs.parent.mkdir()
    pvs.write_text("#!/bin/sh\necho $*\n")
    pvs.chmod(0o755)
    script = Path(__file__).parents[2] / "launch" / "tokenize.sbatch"
    variables = {"VENV": str(tmp_path), "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "16"}
    done = subprocess.run(
        ["bash", str(script), "a", "b", "--out", "c d"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == expected + "\n"
