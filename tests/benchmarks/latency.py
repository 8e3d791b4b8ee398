"""How far sums of measured parts are from whole models: random models of several shapes, timed both ways.

    python -m tests.benchmarks.latency [--context 1024] [--batch 1] [--dtype fp32] [--rounds 3] [--first-token]
        [--cpu-time] [--vocab 49152] [--scale 1]

Parts and whole models take turns, and each has the shortest of the rounds' medians, because other work on the machine
only makes them slower. ``--cpu-time`` counts processor time on one thread, for a machine that is busy.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.api.values import parse_dtype
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.search.timing import InferencePhase, TimedPart, Timer, Workload, parts_of
from nemo_pvs.system.progress import console, progress
from tests.conftest import tiny_llama_config

SIZES = [(10, 384, 768), (30, 384, 1536), (20, 576, 768), (20, 384, 1152), (10, 576, 1536), (30, 576, 1536)]
"""Layers, hidden channels and FFN channels; the last is SmolLM2-135M."""


def main() -> None:
    """Print a table for each phase, and its mean error."""
    options = argparse.ArgumentParser()
    options.add_argument("--context", type=int, default=1024)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--dtype", default="fp32")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--first-token", action="store_true", help="also the time to the first token")
    options.add_argument("--cpu-time", action="store_true")
    options.add_argument("--vocab", type=int, default=49152)
    options.add_argument("--scale", type=int, default=1, help="divides the widths, to try this script")
    given = options.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
    config = model_config(given.vocab, given.scale, max_position_embeddings=2 * given.context)
    workload = Workload(config, "cpu", parse_dtype(given.dtype), given.batch, given.context)
    timer = Timer(workload, time.process_time if given.cpu_time else time.perf_counter)
    shapes = shapes_of(config, given.scale)
    console.print(", ".join(f"{name} {value}" for name, value in workload.machine.items()))
    for phase in ("decode", "first token") if given.first_token else ("decode",):
        predicted, whole = compare(timer, phase, shapes, given.rounds)
        table = Table(
            "layers", "hidden", "ffn", "sum of parts (ms)", "whole model (ms)", "error", title=phase, box=None
        )
        errors = []
        for shape, ours, real in zip(shapes, predicted, whole, strict=True):
            errors.append(ours / real - 1)
            sizes = map(str, (shape.layers, shape.hidden, shape.ffn))
            table.add_row(*sizes, f"{ours * 1e3:,.1f}", f"{real * 1e3:,.1f}", f"{errors[-1]:+.1%}")
        console.print(table)
        console.print(f"mean error {mean(map(abs, errors)):.1%}, of mean sign {mean(errors):+.1%}")


def model_config(vocab: int, scale: int, **settings: Any) -> dict[str, Any]:
    """Return the config of SmolLM2-135M, its widths and vocabulary divided by ``scale``."""
    layers, hidden, ffn = SIZES[-1]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden // scale, "intermediate_size": ffn // scale}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64 // scale}
    settings = {"vocab_size": vocab // scale, "tie_word_embeddings": True, **settings}
    return tiny_llama_config(**sizes, **heads, **settings).to_dict()


def shapes_of(config: dict[str, Any], scale: int) -> list[Shape]:
    """Return the shapes of ``SIZES``, with a head for every 64 hidden channels and three of them in a KV group."""
    parent = Layout.for_config(config).shape(config)
    return [
        parent.replace(
            layers=layers, hidden=hidden // scale, ffn=ffn // scale, heads=hidden // 64, kv_groups=hidden // 192
        )
        for layers, hidden, ffn in SIZES
    ]


def compare(timer: Timer, phase: InferencePhase, shapes: list[Shape], rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds of shapes as sums of parts and of whole models, the shortest of each that was measured."""
    parts: dict[TimedPart, float] = {}
    models: dict[Shape, float] = {}
    with progress(phase, "models") as show:
        for turn in range(rounds):
            for place, shape in enumerate(shapes):
                show(turn * len(shapes) + place, rounds * len(shapes))
                models[shape] = min(timer.whole(phase, shape), models.get(shape, float("inf")))
                for part, _ in parts_of(shape):
                    parts[part] = min(timer.part(phase, part), parts.get(part, float("inf")))
    sums = [sum(count * parts[part] for part, count in parts_of(shape)) for shape in shapes]
    return sums, [models[shape] for shape in shapes]


if __name__ == "__main__":
    main()
