"""Every pruning method on SmolLM2-135M: what it leaves, at what loss without retraining, in what time.

    python -m tests.benchmarks.methods [--samples 32] [--sequence-length 256] [--folder DIR]

Prints the table of docs/methods.md, with times and the file that proves each method. Each row is what
``pvs prune MODEL DST`` does with the options of the row and scores that were measured before (the row of
``pvs calibrate``), from the model's folder to the folder that is then evaluated. One half of the articles calibrates,
windows of the other half are predicted. Losses are in nats per token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.methods import vocabulary
from nemo_pvs.pruning.options import Options
from nemo_pvs.pruning.prune import prune
from nemo_pvs.pruning.registry import at_once, method_named
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.pruning.result import write
from nemo_pvs.pruning.target import parse_sizes
from nemo_pvs.system.progress import progress
from tests.benchmarks.structured_methods import texts

METHODS = [name for name in at_once() if name != vocabulary.NAME]
"""The methods whose losses per token can be compared; ``tests.benchmarks.vocabulary`` measures the other one."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    method: str
    options: dict[str, Any]
    tests: str
    """The file that proves the method."""

    @property
    def asked(self) -> Options:
        """The row's options as the method takes them."""
        others = {name: value for name, value in self.options.items() if name != "target"}
        sizes = parse_sizes(self.options["target"]) if "target" in self.options else {}
        return method_named(self.method).options.parse(self.method, {**others, **sizes})

    @property
    def command(self) -> str:
        """The row's options of ``pvs prune MODEL DST``."""
        return " ".join(
            [
                f"--method {self.method}",
                *(f"--{name.replace('_', '-')} {value}" for name, value in self.options.items()),
            ]
        )


def cases(layers: int, hidden: int, ffn: int) -> Iterator[Case]:
    """Yield every method at a typical setting: a fifth of the decoder layers goes, or every other weight."""
    fifth = {"ratio": 0.2}
    joint = {"target": f"layers={layers - layers // 10},hidden={hidden * 8 // 9},ffn={ffn * 11 // 12}"}
    yield Case("minitron-depth", fifth, "pruning/test_depth.py")
    yield Case("shortgpt", fifth, "pruning/test_shortgpt.py")
    yield Case("minitron-width", fifth, "pruning/test_width.py")
    yield Case("minitron-joint", joint, "pruning/test_joint.py")
    yield Case("flap", fifth, "pruning/test_flap.py")
    for method in (
        "wanda-sp",
        "magnitude-sp",
    ):  # which removes the same share as FLAP
        yield Case(method, {**fifth, "structure": "UL-MM"}, "pruning/test_flap.py")
    # As published: layers 4 to 29 of 32.
    protected = {"structure": "UL-MM", "protect_first": 4, "protect_last": 2}
    yield Case("llm-pruner", {**fifth, **protected}, "pruning/test_llm_pruner.py")
    yield Case("adapt-pruner", {**fifth, "of": "body", "iterations": 10}, "pruning/test_adapt_pruner.py")
    for method in ("sparsegpt", "wanda", "magnitude"):
        for sparsity in ("0.5", "4:8", "2:4"):
            yield Case(method, {"sparsity": sparsity}, f"pruning/test_{method}.py")


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parent", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--samples", type=int, default=32, help="calibration windows; half as many are predicted")
    options.add_argument("--sequence-length", type=int, default=256)
    options.add_argument("--only", action="append", choices=METHODS, help="may be repeated")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent(given.parent, given.folder)
    source = open_source(folder)
    calibration, test = texts(folder, given.samples, given.sequence_length)
    table = Table("method", "tests", "parameters (M)", "zeros", "loss", "perplexity", "seconds", box=box.MARKDOWN)
    table.add_row("dense", "", *result(source, test), "")
    began = time.monotonic()
    with progress("calibrate", "layers") as show:
        scores = calibrate(source, calibration, progress=show)
    calibrated = f"`pvs calibrate`, {calibration.ids.numel():,} tokens"
    table.add_row(calibrated, "calibration/test_engine.py", "", "", "", "", f"{time.monotonic() - began:.0f}")
    shape = shape_of(source)
    for case in cases(shape.layers, shape.hidden, shape.ffn):
        if not given.only or case.method in given.only:
            table.add_row(f"`{case.command}`", case.tests, *row(source, case, calibration, scores, test))
    Console(width=200, highlight=False).print(table)


def row(source: WeightSource, case: Case, calibration: TokenSet, scores: Scores, test: TokenSet) -> list[str]:
    """Prune, write, and evaluate what was written."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "pruned"
        began = time.monotonic()
        gradients = method_named(case.method).gradients  # then the row's time has its own calibration
        pruned, _ = prune(
            case.method,
            PruneRequest(
                source=source,
                options=case.asked,
                tokens=lambda: calibration,
                scores=lambda: calibrate(source, calibration, gradients=True) if gradients else scores,
                check=lambda _: None,
                work_folder=Path(scratch) / "work",
                progress=progress,
                say=lambda _: None,
            ),
        )
        write(pruned, target, "hf")
        seconds = time.monotonic() - began
        return [*result(open_source(target), test), f"{seconds:.0f}"]


def result(source: WeightSource, test: TokenSet) -> list[str]:
    """Return parameters, share of zeros in the decoder layers' matrices, and loss.

    Computed in bf16, four times as fast as fp32 on processors that have instructions for it.
    """
    matrices = list(matrix_sparsity(source))
    zeros = sum(matrix.zeros for matrix in matrices) / sum(matrix.weights for matrix in matrices)
    measured = perplexity(source, test, compute=Compute(dtype=torch.bfloat16))
    parameters = shape_of(source).parameters / 1e6
    return [f"{parameters:.1f}", f"{zeros:.1%}", f"{measured['loss']:.3f}", f"{measured['perplexity']:,.1f}"]


if __name__ == "__main__":
    main()
