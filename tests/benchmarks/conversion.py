"""Conversion and pruning of a large checkpoint compared with ``cp`` of the same bytes: seconds and memory.

    python -m tests.benchmarks.conversion --shape llama31_8b --folder DIR

needs free disk of 2.6 times the model (42 GB at 8B) and makes the model, of random numbers, itself. With
``--rounds 3`` only ``cp`` and the writers for Megatron and GGUF run, in turn, three times: the writers alone are
compared with ``cp``, and with verification with ``cp`` and a ``cmp`` of what it wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nemo_pvs.checkpoints.convert import convert, verify_checkpoint
from nemo_pvs.checkpoints.gguf.write import write_gguf
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan, whole_layers
from tests.benchmarks.measure import Measured, forget_cached, measure

SHAPES = {
    "llama31_8b": Shape(
        layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False
    ),
    "1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_groups=8, head_dim=64, vocab=32000, tied=False),
    "tiny": Shape(layers=4, hidden=64, ffn=112, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=False),
}


class NoiseSource:
    """A bfloat16 Llama whose weights are one stretch of noise from ever another start: no two tensors are alike."""

    assets: tuple[Path, ...] = ()

    def __init__(self, shape: Shape) -> None:
        names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        self.config: dict[str, Any] = {**shape.to_config({}), **names, "torch_dtype": "bfloat16"}
        self._sizes = {name: part.size(shape) for name, (part, _) in Layout.for_config(names).parts(shape).items()}
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.empty(1 << 22, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def read(self, name: str) -> torch.Tensor:
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "little")
        tensor = torch.empty(self._sizes[name], dtype=torch.bfloat16)
        for piece in tensor.flatten().split(len(self._noise) - (1 << 16)):
            piece.copy_(self._noise[start : start + len(piece)])
        return tensor


def make_input(shape: Shape, folder: Path) -> None:
    """Write the model with a tokenizer of bytes; run in a separate process, which the imports make large."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    write_huggingface(NoiseSource(shape), folder)
    vocabulary = {byte: index for index, byte in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet())[:127], "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def half_width(parent: Shape) -> Plan:
    """Return a plan that keeps scattered channels, 3/4 of hidden and 9/14 of ffn: 4B of Llama 3.1 8B are left."""
    generator = torch.Generator().manual_seed(0)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(size, generator=generator)[:count].tolist()))

    target = parent.replace(hidden=parent.hidden * 3 // 4, ffn=parent.ffn * 9 // 14, heads=parent.heads)
    kept = {
        **whole_layers(parent, range(parent.layers)),
        "keep_hidden": some(parent.hidden, target.hidden),
        "keep_ffn": tuple(some(parent.ffn, target.ffn) for _ in range(parent.layers)),
    }
    return Plan("benchmark", parent, target, **kept)


def copy(source: Path, target: Path) -> None:
    """Copy as ``cp`` does and wait until the disk has it."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)


def copy_and_compare(source: Path, target: Path) -> None:
    """Copy, and read the copy back from the disk to compare it."""
    copy(source, target)
    forget_cached(target)
    for path in source.rglob("*"):
        if path.is_file():
            subprocess.run(["cmp", path, target / path.relative_to(source)], check=True)


def converted(source: Path, target: Path, to: str, verify: str) -> None:
    torch.set_num_threads(1)
    convert(source, target, to=to, verify=verify)


def pruned(source: Path, target: Path, write: Callable[..., Any], verify: bool) -> None:
    torch.set_num_threads(1)
    parent = open_source(source)
    write(PrunedSource(parent, half_width(shape_of(parent))), target)
    if verify:
        verify_checkpoint(target)


def to_gguf(source: Path, target: Path, dtype: str, verify: bool = True) -> None:
    torch.set_num_threads(1)
    target.mkdir()
    write_gguf(open_source(source), target / "model.gguf", dtype=dtype, verify=verify)


def contenders(folder: Path) -> Iterator[tuple[str, Measured]]:
    """Run everything in turn, each reading a disk whose cache was dropped; yields (label, measured)."""
    source, nemo, product = folder / "hf", folder / "nemo", folder / "product"

    def run(label: str, work: Callable[..., Any], origin: Path, target: Path, *arguments: Any) -> tuple[str, Measured]:
        forget_cached(origin)
        measured = measure(work, origin, target, *arguments)
        if target == product:
            shutil.rmtree(product)
        return label, measured

    yield run("cp and sync of the HF folder", copy, source, product)
    yield run("HF to GGUF as bf16", to_gguf, source, product, "bf16")
    yield run("HF to GGUF as q8_0", to_gguf, source, product, "q8_0")
    yield run("HF to NeMo, not verified", converted, source, product, "nemo", "none")
    yield run("HF to Megatron, not verified", converted, source, product, "megatron", "none")
    yield run("HF to Megatron", converted, source, product, "megatron", "checksum")
    yield run("prune to HF, not verified", pruned, source, product, write_huggingface, False)
    yield run("prune to HF", pruned, source, product, write_huggingface, True)
    yield run("prune to NeMo", pruned, source, product, write_nemo, True)
    yield run("HF to NeMo", converted, source, nemo, "nemo", "checksum")
    shutil.rmtree(source)  # two copies on the disk are enough
    yield run("NeMo to HF, not verified", converted, nemo, product, "hf", "none")
    yield run("cp and sync of the NeMo folder", copy, nemo, product)
    yield run("NeMo to HF", converted, nemo, source, "hf", "checksum")
    shutil.rmtree(nemo)


def prepare_input(shape: Shape, folder: Path, console: Console) -> None:
    """Make ``folder``/hf, unless an earlier run has left it."""
    if not (folder / "hf").exists():
        with console.status("make the input"):
            measure(make_input, shape, folder / "hf")
    elif shape_of(HuggingFaceSource(folder / "hf")) != shape:
        raise SystemExit(f"{folder / 'hf'} holds another model; remove it.")


def rounds_of_writers(shape: Shape, folder: Path, rounds: int, console: Console) -> Table:
    """Measure ``cp`` and the writers in turn, without and with verification, and return the table."""
    prepare_input(shape, folder, console)
    source, product = folder / "hf", folder / "product"
    alone: dict[str, tuple[Any, ...]] = {
        "cp and sync": (copy,),
        "HF to Megatron": (converted, "megatron", "none"),
        "HF to GGUF as bf16": (to_gguf, "bf16", False),
        "HF to GGUF as q8_0": (to_gguf, "q8_0", False),
    }
    verified: dict[str, tuple[Any, ...]] = {
        "cp, sync and cmp": (copy_and_compare,),
        "HF to Megatron, verified": (converted, "megatron", "checksum"),
        "HF to GGUF as bf16, verified": (to_gguf, "bf16", True),
        "HF to GGUF as q8_0, verified": (to_gguf, "q8_0", True),
    }
    results: dict[str, list[Measured]] = {label: [] for label in (*alone, *verified)}
    for _ in range(rounds):
        for label, (work, *arguments) in {**alone, **verified}.items():
            forget_cached(source)
            results[label].append(measure(work, source, product, *arguments))
            shutil.rmtree(product)
    medians = {label: statistics.median(one.seconds for one in measured) for label, measured in results.items()}
    made = Table(title=str(shape))
    for column in ("", "s, every round", "x cp", "x cp and cmp", "CPU s", "peak MB"):
        made.add_column(column, justify="right" if column else "left")
    for label, measured in results.items():
        seconds = ", ".join(f"{one.seconds:.1f}" for one in measured)
        ratios = [f"{medians[label] / medians[reference]:.2f}" for reference in ("cp and sync", "cp, sync and cmp")]
        processor = f"{statistics.median(one.cpu_seconds for one in measured):.1f}"
        peak = "" if label.startswith("cp") else f"{max(one.peak for one in measured) / 1e6:,.0f}"
        made.add_row(label, seconds, *ratios, processor, peak)
    return made


def benchmark(shape: Shape, folder: Path, console: Console) -> dict[str, Measured]:
    """Measure and show everything; the input stays in ``folder``/hf for the next time."""
    prepare_input(shape, folder, console)
    results: dict[str, Measured] = {}
    for label, measured in contenders(folder):
        results[label] = measured
        console.print(f"{label}: {measured.seconds:.1f} s", highlight=False)
    console.print(table(shape, results))
    return results


def table(shape: Shape, results: dict[str, Measured]) -> Table:
    copies = [measured.seconds for label, measured in results.items() if label.startswith("cp")]
    copy_seconds = sum(copies) / len(copies)
    parts = Layout.for_config({"architectures": ["LlamaForCausalLM"]}).entries(shape)
    largest = max(2 * torch.Size(entry.size(shape)).numel() for entry in parts)
    made = Table(title=f"{shape}; largest tensor {largest / 1e6:,.0f} MB")
    for column in ("", "s", "x cp", "CPU s", "peak MB", "before MB", "largest tensors"):
        made.add_column(column, justify="right" if column else "left")
    for label, measured in results.items():
        own = measured.peak - measured.baseline
        cells = [
            label,
            f"{measured.seconds:.1f}",
            f"{measured.seconds / copy_seconds:.2f}",
            f"{measured.cpu_seconds:.1f}",
        ]
        if not label.startswith("cp"):
            cells += [f"{measured.peak / 1e6:,.0f}", f"{measured.baseline / 1e6:,.0f}", f"{own / largest:.2f}"]
        made.add_row(*cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama31_8b")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--rounds", type=int, help="only cp and the writers for Megatron and GGUF, this many times")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_conversion"))
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = shape.replace(layers=options.layers or shape.layers)
    if options.rounds:
        Console().print(rounds_of_writers(shape, options.folder, options.rounds, Console()))
    else:
        benchmark(shape, options.folder, Console())


if __name__ == "__main__":
    main()
