"""``pvs tokenize`` compared with a plain loop and with Megatron-LM's preprocessing, from one file of JSON lines.

    python -m tests.benchmarks.tokenizing [--tokenizer FOLDER] [--text FILE...] [--megabytes 60] [--rounds 2]

The plain loop encodes one document at a time with the same tokenizer. Megatron-LM's ``tools/preprocess_data.py`` does
so in the workers of a ``multiprocessing.Pool``, 32 lines at a time, and writes in the parent; here this is written
plainly. All take turns, each in a new process, whose imports count, and their token files must be equal. Ratios
are of the least seconds, and of the least seconds of the processor. Without ``--text`` the text is the Wikipedia
sample, repeated, which flatters an encoder that remembers words; without ``--tokenizer`` it is SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

from nemo_pvs.system.progress import console

_LINES = 32  # at a time, as Megatron-LM


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--tokenizer", type=Path)
    options.add_argument("--text", type=Path, nargs="+")
    options.add_argument("--megabytes", type=float, default=60)
    options.add_argument("--rounds", type=int, default=2)
    given = options.parse_args()
    from nemo_pvs.checkpoints.fetch import prepare_parent  # not for the contenders

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = given.tokenizer or prepare_parent("smollm2-135m", folder / "parent")
        write_text(folder / "text.jsonl", given.text, int(given.megabytes * 1e6))
        measured = compare(folder / "text.jsonl", tokenizer, folder, given.rounds, list(CONTENDERS))
    table = Table("", "seconds", "ratio", "CPU seconds", "ratio")
    loop = measured["plain loop"]
    for contender, (seconds, cpu) in measured.items():
        ratios = [f"{usual / own:.2f}" for usual, own in zip(loop, (seconds, cpu), strict=True)]
        table.add_row(contender, f"{seconds:.1f}", ratios[0], f"{cpu:.1f}", ratios[1])
    console.print(table)
    console.print(f"load of this machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def write_text(path: Path, texts: list[Path] | None, size: int) -> None:
    """Write about ``size`` bytes of JSON lines: those of the files in turn, or else the Wikipedia sample."""
    written = 0
    with open(path, "wb") as file:
        for line in _lines(texts):
            written += file.write(line)
            if written >= size:
                return


def _lines(texts: list[Path] | None) -> Iterator[bytes]:
    if texts is None:
        from nemo_pvs.data.wikipedia import sample_articles

        yield from cycle([json.dumps({"text": text}).encode() + b"\n" for _, text in sample_articles()])
    for lines in zip(*(cycle(path.read_bytes().splitlines(keepends=True)) for path in texts or ()), strict=False):
        yield from lines


def compare(
    text: Path, tokenizer: Path, folder: Path, rounds: int, names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Return the least seconds and the least seconds of the processor of the named contenders.

    Raises:
        AssertionError: the token files differ.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for contender in names:
            out = folder / f"{contender} {number}"
            out.mkdir()
            call = (
                "from tests.benchmarks import tokenizing as t; "
                f"t.CONTENDERS[{contender!r}](*map(t.Path, t.sys.argv[1:]))"
            )
            before, began = _children_seconds(), time.perf_counter()
            subprocess.run([sys.executable, "-c", call, text, tokenizer, out], check=True)
            measured[contender].append((time.perf_counter() - began, _children_seconds() - before))
    for suffix in (".bin", ".idx"):
        contents = [(folder / f"{contender} 0" / f"train{suffix}").read_bytes() for contender in names]
        assert contents == contents[:1] * len(contents), f"the {suffix} files differ"
    return {name: (min(one for one, _ in runs), min(one for _, one in runs)) for name, runs in measured.items()}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_tokenizer: Any


def _load(folder: Path) -> None:
    from transformers import AutoTokenizer

    global _tokenizer
    _tokenizer = AutoTokenizer.from_pretrained(folder)


def _encode(line: str) -> list[int]:
    text = json.loads(line)["text"]
    return [*_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], _tokenizer.eos_token_id]


def _write(documents: Iterator[list[int]], vocab: int, out: Path) -> None:
    import torch

    from nemo_pvs.system.megatron_import import import_megatron

    import_megatron()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(out / "train.bin"), dtype=DType.optimal_dtype(vocab))
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(out / "train.idx"))


def _plain_loop(text: Path, tokenizer: Path, out: Path) -> None:
    _load(tokenizer)
    with open(text) as file:
        _write(map(_encode, file), len(_tokenizer), out)


def _megatron_lm(workers: int, text: Path, tokenizer: Path, out: Path) -> None:
    _load(tokenizer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise a warning about the fork
    with multiprocessing.Pool(workers, _load, (tokenizer,)) as pool, open(text) as file:
        _write(pool.imap(_encode, file, _LINES), len(_tokenizer), out)


def _pvs(workers: int, text: Path, tokenizer: Path, out: Path) -> None:
    import nemo_pvs

    nemo_pvs.tokenize(text, tokenizer, out, split={"train": 1.0}, workers=workers)


CONTENDERS: dict[str, Callable[[Path, Path, Path], None]] = {
    "plain loop": _plain_loop,
    "Megatron-LM, 1 worker": partial(_megatron_lm, 1),
    "Megatron-LM, 2 workers": partial(_megatron_lm, 2),
    "pvs tokenize, 1 worker": partial(_pvs, 1),
    "pvs tokenize, 2 workers": partial(_pvs, 2),
}


if __name__ == "__main__":
    main()
