"""Our Wanda and SparseGPT, llm-compressor's and the published scripts' arithmetic: seconds, memory, masks.

    python -m tests.benchmarks.llm_compressor --llm-compressor PYTHON [--model FOLDER | --shape 1b] [--only wanda]

PYTHON is the interpreter of an environment in which ``pip install llm-compressor`` was done; ours cannot have it, they
need other versions of transformers. All prune the same model on the same tokens in the same computing type, one after
the other, each in a process of its own, from the model's folder to the written result. Imports are not counted. With
--shape the model is made of random numbers and reads random tokens. Losses are in nats per token, of other text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from safetensors.torch import save_file

from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.system.progress import console
from tests.benchmarks.conversion import SHAPES, make_input
from tests.benchmarks.measure import measure
from tests.benchmarks.structured_methods import texts

METHODS = ("wanda", "sparsegpt")
SPARSITIES = ("0.5", "2:4")


@dataclass(frozen=True)
class Outcome:
    """What a contender took, and what came of it."""

    seconds: float
    peak: int
    """Most resident bytes, of which ``baseline`` before the work: the interpreter and the libraries."""
    baseline: int
    loss: float
    """Of the pruned model, on text that was not read in calibration."""
    zeros: float
    """Share of the weights of the pruned matrices."""
    equal: float
    """Share of the weights that are either kept here and by us, or removed here and by us."""
    equal_at_first: float
    """The same in the first layer, whose inputs rounding has not moved yet."""


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--llm-compressor", metavar="PYTHON", help="without it the others run")
    options.add_argument("--model", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--shape", choices=SHAPES, help="random numbers instead of a model")
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--sequence-length", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=8, help="the published scripts' is 1")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--only", action="append", choices=METHODS, help="may be repeated")
    options.add_argument("--sparsity", action="append", help=f"may be repeated; {' and '.join(SPARSITIES)} by default")
    given = options.parse_args()
    pythons = {"ours": sys.executable, "published": sys.executable}
    if given.llm_compressor:
        pythons["llm-compressor"] = given.llm_compressor
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, calibration, test = prepare(folder / "model", given)
        save_file({"ids": calibration.ids}, folder / "ids.safetensors")
        common = {
            "model": str(model),
            "ids": str(folder / "ids.safetensors"),
            "batch_size": given.batch_size,
            "dtype": given.dtype,
        }
        table = Table("", *HEADINGS, title=f"{given.shape or given.model}, {describe(calibration, given)}", box=None)
        for method in given.only or METHODS:
            for sparsity in given.sparsity or SPARSITIES:
                job = {**common, "method": method, "sparsity": sparsity}
                outcomes = compare(pythons, job, folder, test)
                for name, outcome in outcomes.items():
                    table.add_row(f"{method} {sparsity}, {name}", *cells(outcome, outcomes["ours"]))
                table.add_section()
    console.width = max(console.width, 150)
    console.print(table)


def prepare(folder: Path, given: argparse.Namespace) -> tuple[Path, TokenSet, TokenSet]:
    """Return the model's folder, the tokens to calibrate on, and others."""
    if given.shape:
        measure(make_input, SHAPES[given.shape], folder)
        from tests.conftest import save_tiny_tokenizer  # brings Megatron along, which takes a while

        save_tiny_tokenizer(folder)  # llm-compressor wants one
        size = (given.samples, given.sequence_length)
        calibration, test = (random_tokens(size, SHAPES[given.shape].vocab, seed) for seed in range(2))
        return folder, calibration, test
    model = prepare_parent(given.model, folder)
    return model, *texts(model, given.samples, given.sequence_length)


def random_tokens(size: tuple[int, int], vocab: int, seed: int) -> TokenSet:
    """Return tokens without meaning, int32 [N, S]."""
    drawn = torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))
    return TokenSet.from_windows(
        list(drawn.numpy()), data_set="random", source_sha256=None, tokenizer_sha256=None, seed=seed
    )


def describe(calibration: TokenSet, given: argparse.Namespace) -> str:
    """Say what all of them read and compute with."""
    samples, length = calibration.ids.shape
    return f"{samples} x {length} tokens, batches of {given.batch_size}, {given.dtype}"


def compare(pythons: dict[str, str], job: dict[str, object], folder: Path, test: TokenSet) -> dict[str, Outcome]:
    """Run everybody on a job in turn; ours comes first, the others' masks are held against it."""
    outcomes = {}
    for name, python in pythons.items():
        took = run(name, python, {**job, "target": str(folder / name)}, folder / "job.json")
        console.print(f"{job['method']} {job['sparsity']}, {name}: {took['seconds']:.1f} s")
        zeros, equal, equal_at_first = agreement(folder / "ours", folder / name)
        loss = perplexity(open_source(folder / name), test, compute=Compute(dtype=torch.bfloat16))["loss"]
        took = {key: took[key] for key in ("seconds", "peak", "baseline")}
        outcomes[name] = Outcome(**took, loss=loss, zeros=zeros, equal=equal, equal_at_first=equal_at_first)
    for path in folder.iterdir():
        if path.name.removesuffix(".work") in pythons:
            shutil.rmtree(path)
    return outcomes


def run(contender: str, python: str, job: dict[str, object], file: Path) -> dict[str, float]:
    """Run a contender in a new process."""
    file.write_text(json.dumps(job))
    command = [python, "-W", "ignore", "-m", "tests.benchmarks.sparse_contenders", contender, str(file)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(ours: Path, theirs: Path) -> tuple[float, float, float]:
    """Return their share of zeros, and how often we agree what goes, weight for weight: everywhere, in layer 0."""
    masks, weights = masks_of(open_source(ours)), open_source(theirs)
    first = [name for name in masks.names if name.startswith("model.layers.0.")]
    counts = {name: counted(weights.read(name) != 0, masks.read(name)) for name in masks.names}
    zeros, equal, total = (sum(column) for column in zip(*counts.values(), strict=True))
    _, equal_at_first, first_total = (sum(column) for column in zip(*(counts[name] for name in first), strict=True))
    return zeros / total, equal / total, equal_at_first / first_total


def counted(kept: torch.Tensor, ours: torch.Tensor) -> tuple[int, int, int]:
    """Return zeros, weights that we agree about, and weights."""
    return int((~kept).sum()), int((kept == ours).sum()), kept.numel()


HEADINGS = (
    *("s", "x ours", "peak MB", "x ours", "before MB", "own MB", "x ours", "zeros"),
    *("equal mask bits", "in layer 0", "loss"),
)


def cells(outcome: Outcome, ours: Outcome) -> list[str]:
    """Return a row behind its name."""
    own = outcome.peak - outcome.baseline
    return [
        f"{outcome.seconds:.1f}",
        f"{outcome.seconds / ours.seconds:.2f}",
        f"{outcome.peak / 1e6:,.0f}",
        f"{outcome.peak / ours.peak:.2f}",
        f"{outcome.baseline / 1e6:,.0f}",
        f"{own / 1e6:,.0f}",
        f"{own / (ours.peak - ours.baseline):.2f}",
        f"{outcome.zeros:.2%}",
        f"{outcome.equal:.2%}",
        f"{outcome.equal_at_first:.2%}",
        f"{outcome.loss:.3f}",
    ]


if __name__ == "__main__":
    main()
