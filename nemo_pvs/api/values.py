"""Values as users write them, and what they mean: sizes in bytes, devices, texts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pvs.errors import UserError

if TYPE_CHECKING:
    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.checkpoints.source import WeightSource
    from nemo_pvs.layerwise.model import Compute

AUTO = "auto"
_CHARACTERS_AT_ONCE = 1 << 23
"""Of a text that is tokenised, for which the tokenizer needs about 1.2 GB."""
_LONG = 100 * 10**6
"""Bytes of a text that takes minutes."""


def tokens_of(
    checkpoint: str | Path,
    data: str,
    samples: int,
    sequence_length: int,
    seed: int,
    loader: str | None = None,
    windows: str = "packed",
) -> Any:
    """Return windows of a text (tokenised with the model's tokenizer) or of a Megatron token file.

    Raises:
        UserError: the text or the tokenizer cannot be read, there is too little text, or ``windows`` is unknown.
    """
    one_of("--windows", windows, ("packed", "documents"))
    if loader is not None and windows != "packed":
        raise UserError("--loader decides how windows are cut; leave --windows out.")
    from nemo_pvs.data.assets import tokenizer_folder
    from nemo_pvs.data.corpus import input_files, read_documents
    from nemo_pvs.data.token_files import check_tokenizer, token_file_manifest
    from nemo_pvs.data.token_set import TokenSet
    from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
    from nemo_pvs.system.progress import console

    settings: dict[str, Any] = {
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": None if seed < 0 else seed,
        "windows": windows,
    }
    if loader is not None:
        from nemo_pvs.data.reference_sets import load_tokens

        return load_tokens(
            loader,
            data,
            tokenizer_folder(Path(checkpoint)),
            samples=samples,
            sequence_length=sequence_length,
            seed=max(seed, 0),
        )
    folder = tokenizer_folder(Path(checkpoint))
    if data.endswith(".bin"):
        prefix = Path(data.removesuffix(".bin"))
        if token_file_manifest(prefix):
            check_tokenizer(prefix, tokenizer_hash(folder))
        return TokenSet.from_token_file(prefix, **settings)
    tokenizer = load_tokenizer(folder)
    size = sum(file.stat().st_size for file in input_files([data]) if file)
    if size > _LONG:
        console.print(
            f"{data} has {size / 1e9:.1f} GB, all of which is tokenised to draw {samples} windows. One of its files, "
            "or a token file (pvs tokenize), is faster.",
            soft_wrap=True,
        )
    return TokenSet.from_documents(
        (document.text for document in read_documents(data)),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        data_set=data,
        tokenizer_sha256=tokenizer_hash(folder),
        characters_at_once=_CHARACTERS_AT_ONCE,
        **settings,
    )


def token_counts_of(checkpoint: str | Path, data: str, vocab: int) -> Any:
    """Return how often each of a model's ``vocab`` tokens occurs in a whole text or token file.

    Raises:
        UserError: the text or the tokenizer is missing, or the token file was made with another tokenizer.
    """
    from nemo_pvs.data.assets import tokenizer_folder
    from nemo_pvs.data.corpus import read_documents
    from nemo_pvs.data.token_counts import counts_of_documents, counts_of_token_file
    from nemo_pvs.data.token_files import describe_token_file
    from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
    from nemo_pvs.system.progress import progress

    folder = tokenizer_folder(Path(checkpoint))
    if data.endswith(".bin"):
        prefix = Path(data.removesuffix(".bin"))
        describe_token_file(prefix, tokenizer_hash(folder), vocab)
        return counts_of_token_file(prefix, vocab)
    with progress("count tokens", "documents") as show:
        return counts_of_documents(read_documents(data), load_tokenizer(folder), vocab, show)


def scores_of(scores: str | Path | Scores, model: WeightSource) -> Scores:
    """Return scores, or those in a folder, once it is sure that they were measured on ``model``.

    Raises:
        UserError: they were measured on another model, or the folder holds none.
    """
    from nemo_pvs.calibration.scores import Scores

    if isinstance(scores, Scores):
        scores.check_model(model)
        return scores
    return Scores.load(Path(scores), model)


def compute_of(device: str | None, activation_memory: str) -> Compute:
    """Return where and how layers run: on the GPU if there is one, each rank on its own.

    Args:
        device: ``cpu`` or ``cuda``; None for the GPU if there is one.
        activation_memory: A size such as ``8GB``; ``auto`` is 8 GB on the CPU and what there is room for with a GPU.

    Raises:
        UserError: there is no such device, or the size is not valid.
    """
    import torch

    from nemo_pvs.layerwise.model import Compute
    from nemo_pvs.system.rendezvous import local_rank

    name = device_name("--device", device)
    limit: int | None = None
    if activation_memory != AUTO:
        limit = parse_bytes("--activation-memory", activation_memory)
    elif name == "cpu":
        limit = 8 * 10**9
    return Compute(
        device=name if name == "cpu" else f"cuda:{local_rank()}",
        dtype=torch.float32 if name == "cpu" else torch.bfloat16,
        memory_limit=limit,
    )


def device_name(option: str, device: str | None) -> str:
    """Return the given device, ``cpu`` or ``cuda``; by default ``cuda`` if there is a GPU.

    Raises:
        UserError: there is no such device.
    """
    import torch

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    one_of(option, name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option} is cuda, but PyTorch sees no GPU here; choose cpu.")
    return name


def parse_dtype(name: str | None) -> Any:
    """Return the torch dtype that bf16, fp16 or fp32 names; None stays None."""
    import torch

    if name is None:
        return None
    one_of("--dtype", name, ("bf16", "fp16", "fp32"))
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def parse_bytes(option: str, text: str) -> int:
    """Return a size such as 5GB or 500MB in bytes, decimal as on a disk's label."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    try:
        size = int(float(text[:-2]) * units[text[-2:].upper()])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{option} is {text!r}; write a size such as 5GB or 500MB.")
    return size


def parse_latency(text: str) -> float:
    """Return a time such as 12ms, 0.5s or 800us in seconds."""
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", text.strip(), re.ASCII)
    seconds = float(found[1]) * units[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise UserError(
            f"--latency is {text!r}; write a time with its unit, such as 12ms, 0.5s or 800us; to bound FLOPs, give "
            "--flops-per-token."
        )
    return seconds


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """Return ``value`` if it is allowed; else raise a UserError that names the option."""
    if value not in allowed:
        raise UserError(f"{option} is {value!r}; choose {', '.join(allowed[:-1])} or {allowed[-1]}.")
    return value


def parse_shares(text: str) -> dict[str, float]:
    """Return ``train=0.9,validation=0.1`` as a dictionary."""
    try:
        return {name.strip(): float(share) for name, share in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise UserError(f"--split is {text!r}; write it as train=0.9,validation=0.1.") from None


def parse_shard(text: str) -> tuple[int, int]:
    """Return ``3/16`` as numbers."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard is {text!r}; write it as 3/16, the third of 16 shards.")
    return int(number), int(count)


def parse_pairs(text: str) -> list[tuple[int, int]]:
    """Return ``4:6,8:13`` as pairs."""
    try:
        return [(int(ours), int(theirs)) for ours, theirs in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        raise UserError(f"--layer-pairs is {text!r}; write it as 4:6,8:13, student:teacher.") from None
