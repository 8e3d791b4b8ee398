"""Structured pruning of SmolLM2-135M by each method: loss without retraining, all methods from one calibration.

    python -m tests.benchmarks.structured_methods [--ratio 0.2] [--samples 64] [--sequence-length 256] [--folder DIR]

One half of the articles calibrates, windows of the other half are predicted. The ratio is of the weights in the
matrices of the decoder layers; the first column says what a method's rounding makes of it. Width pruning removes a
third of the hidden channels and of the FFN's. Losses are in nats per token.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.taylor import METRICS
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.corpus import WIKIPEDIA_SAMPLE, read_documents
from nemo_pvs.data.split import split_documents
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.flap import plan_flap
from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner
from nemo_pvs.pruning.structured.magnitude_sp import plan_magnitude_sp
from nemo_pvs.pruning.structured.wanda_sp import plan_wanda_sp
from nemo_pvs.pruning.structured.width import plan_width
from nemo_pvs.system.progress import console, progress


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--parent", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--ratio", type=float, default=0.2)
    options.add_argument("--samples", type=int, default=64, help="calibration windows; half as many are predicted")
    options.add_argument("--sequence-length", type=int, default=256)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent(given.parent, given.folder)
    source = open_source(folder)
    calibration, test = texts(folder, given.samples, given.sequence_length)
    with progress("calibrate", "layers") as show:
        scores = calibrate(source, calibration, gradients=True, progress=show)
    table = Table("method", "removed", "ffn", "groups", "loss", "perplexity")
    for name, plan in {"dense": None, **plans(scores, given.ratio)}.items():
        table.add_row(name, *row(source, plan, scores.shape, test))
        if name in {"dense", "random units, UL-MM"}:
            table.add_section()
    console.print(table)


def plans(scores: Scores, ratio: float) -> dict[str, Plan]:
    """Return the plan of each method."""
    parent = scores.shape
    made = {
        f"FLAP, {structure}, {'bias' if bias else 'no bias'}": plan_flap(scores, ratio, structure=structure, bias=bias)
        for structure in ("AL-AM", "AL-MM", "UL-MM")
        for bias in (True, False)
    }
    for metric in ("IFV", "WIFN"):
        made[f"FLAP, AL-AM, bias, {metric}"] = plan_flap(scores, ratio, metric=metric)
    made["FLAP, AL-AM, bias, not squared"] = plan_flap(scores, ratio, square_attention=False)
    made["FLAP, uniform, ffn x 64, bias"] = plan_flap(scores, ratio, uniform=True, ffn_multiple=64)
    made["FLAP, AL-AM, bias, compat"] = plan_flap(scores, ratio, compat=True)
    for structure in ("UL-MM", "UL-UM"):
        made[f"wanda-sp, {structure}"] = plan_wanda_sp(scores, ratio, structure=structure)
        made[f"magnitude-sp, {structure}"] = plan_magnitude_sp(scores, ratio, structure=structure)
    for metric in METRICS:
        for structure in ("UL-MM", "AL-AM"):
            name = f"llm-pruner, {structure}, {metric}"
            made[name] = plan_llm_pruner(scores, ratio, metric=metric, structure=structure)
    ends = {"protect_first": parent.layers // 7, "protect_last": parent.layers // 15}
    for structure in ("UL-MM", "AL-AM"):
        made[f"llm-pruner, {structure}, ends protected"] = plan_llm_pruner(scores, ratio, structure=structure, **ends)
    made["random units, UL-MM"] = shuffled(plan_wanda_sp(scores, ratio, structure="UL-MM"))
    target = parent.replace(hidden=2 * parent.hidden // 3, ffn=2 * parent.ffn // 3)
    for aggregation in ("energy", "meanabs_l2"):
        made[f"width by {aggregation}"] = plan_width(scores, target, aggregation)
    made["width, random channels"] = shuffled(plan_width(scores, target))
    return made


def shuffled(plan: Plan) -> Plan:
    """Return a plan that keeps as much, chosen by chance."""
    draw = random.Random(0)
    parent = plan.parent

    def some(size: int, kept: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(size), len(kept))))

    return Plan(
        method="random",
        parent=parent,
        target=plan.target,
        keep_layers=plan.keep_layers,
        keep_hidden=some(parent.hidden, plan.keep_hidden),
        keep_ffn=tuple(some(parent.ffn, kept) for kept in plan.keep_ffn),
        keep_kv_groups=tuple(some(parent.kv_groups, kept) for kept in plan.keep_kv_groups),
    )


def row(source: WeightSource, plan: Plan | None, parent: Shape, test: TokenSet) -> list[str]:
    """Return a model's cells behind its name; bf16 is four times as fast as fp32 on processors that have it."""
    shape = parent if plan is None else plan.target
    measured = perplexity(
        source if plan is None else PrunedSource(source, plan), test, compute=Compute(dtype=torch.bfloat16)
    )
    removed = 1 - shape.matrix_parameters / parent.matrix_parameters
    ffn, _, groups = (
        f"{min(sizes)}-{max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
        for sizes in zip(*shape.layer_sizes, strict=True)
    )
    return [f"{removed:.2%}", ffn, groups, f"{measured['loss']:.3f}", f"{measured['perplexity']:,.1f}"]


def texts(folder: Path, samples: int, sequence_length: int) -> tuple[TokenSet, TokenSet]:
    """Return windows to calibrate on, and half as many of other articles to predict."""
    tokenizer = load_tokenizer(folder)
    parts = split_documents(read_documents(WIKIPEDIA_SAMPLE), {"calibration": 0.5, "test": 0.5})
    calibration, test = (
        TokenSet.from_documents(
            (document.text for document in parts[name]),
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            samples=count,
            sequence_length=sequence_length,
            seed=0,
            data_set=WIKIPEDIA_SAMPLE,
        )
        for name, count in (("calibration", samples), ("test", samples // 2))
    )
    return calibration, test


if __name__ == "__main__":
    main()
