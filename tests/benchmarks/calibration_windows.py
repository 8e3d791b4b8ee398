"""Calibration windows cut from all documents joined, or each from one: the loss of SmolLM2-135M pruned either way.

    python -m tests.benchmarks.calibration_windows [--samples 32] [--sequence-length 128] [--seeds 2] [--folder DIR]

Documents are the paragraphs of the Wikipedia sample, which are about as long as a window; articles are so much longer
that few windows would hold parts of two. Those of every other article calibrate; windows of the other articles are
predicted. Losses are in nats per token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.data.wikipedia import sample_articles
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.prune import prune
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.pruning.result import write
from nemo_pvs.system.progress import progress

METHODS = {"wanda": {"sparsity": "0.5"}, "minitron-width": {"ratio": 0.2}}
WINDOWS = ("packed", "documents")


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parent", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--sequence-length", type=int, default=128)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent(given.parent, given.folder)
    losses = measure(folder, given.samples, given.sequence_length, given.seeds)
    table = Table("method", "windows", "loss of each seed", "mean", box=box.MARKDOWN)
    for (method, windows), values in losses.items():
        mean = f"{statistics.mean(values):.3f}"
        table.add_row(f"`{method}`", windows, ", ".join(f"{value:.3f}" for value in values), mean)
    Console(width=200, highlight=False).print(table)


def measure(folder: Path, samples: int, sequence_length: int, seeds: int) -> dict[tuple[str, str], list[float]]:
    """Return the loss of each seed, by method and windows, in nats per token."""
    source, tokenizer = open_source(folder), load_tokenizer(folder)
    articles = [text.split("\n") for _, text in sample_articles()]
    paragraphs = [[paragraph for article in articles[half::2] for paragraph in article] for half in (0, 1)]

    def cut(texts: list[str], seed: int | None, windows: str) -> TokenSet:
        return TokenSet.from_documents(
            texts,
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            windows=windows,
        )

    test = cut(paragraphs[1], None, "packed")
    losses: dict[tuple[str, str], list[float]] = {(method, one): [] for method in METHODS for one in WINDOWS}
    for seed in range(seeds):
        for windows in WINDOWS:
            tokens = cut(paragraphs[0], seed, windows)
            for method, settings in METHODS.items():
                with tempfile.TemporaryDirectory() as scratch:
                    pruned, _ = prune(
                        method,
                        PruneRequest(
                            source=source,
                            options=method_named(method).options.parse(method, dict(settings)),
                            tokens=lambda tokens=tokens: tokens,
                            scores=lambda tokens=tokens: calibrate(source, tokens),
                            check=lambda _: None,
                            work_folder=Path(scratch) / "work",
                            progress=progress,
                            say=lambda _: None,
                        ),
                    )
                    target = Path(scratch) / "pruned"
                    write(pruned, target, "hf")
                    measured = perplexity(open_source(target), test, compute=Compute(dtype=torch.bfloat16))
                    losses[method, windows].append(measured["loss"])
    return losses


if __name__ == "__main__":
    main()
