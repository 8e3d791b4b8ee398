"""A finished run folder of a tiny model, with every kind of stage, as an archive."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.unchanged.models import make_exact_llama, make_text

ARCHIVE = Path(__file__).parent / "golden" / "finished_run.tar.xz"
_RECORDED_AT = "/recorded"
"""Stands in the archive for the folder in which the run was made."""
_LEFT_OUT = ("*.log", "log.txt", "nemo_*.txt", "index/*", "tensorboard/*", "*tfevents*", "*.html", "*.svg")
_VOCAB = 64


def recipe() -> dict[str, Any]:
    """Return a recipe that prunes to one target by each kind of method; its paths are relative."""
    return {
        "name": "unchanged",
        "title": "A run made before the modules moved",
        "parent": {"source": "parent", "pretraining_tokens": 2048},
        "data": {
            "source": "corpus.jsonl",
            "split": {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1},
        },
        "calibrate": {"samples": 8, "sequence_length": 16, "scan_samples": 4},
        "targets": {
            "width": {"method": "minitron-width", "hidden": 12, "ffn": 16, "distill": True},
            "depth": {"method": "minitron-depth", "layers": 2, "arms": ["pruned"]},
            "uneven": {"method": "flap", "ratio": 0.3},
            "sparse": {"method": "wanda", "sparsity": "2:4"},
            "gradients": {"method": "llm-pruner", "ratio": 0.3, "arms": ["pruned"]},
            "dense": {"method": "dense", "arms": ["pruned"]},
            "learned": {
                "method": "sheared-llama",
                "hidden": 12,
                "ffn": 16,
                "learn": {"tokens": 160 * 64, "mask_learning_rate": 0.5, "validations": 1, "checkpoints": 1},
                "arms": ["pruned"],
            },
            "aware": {
                "method": "efficient-llm",
                "pruning_aware": {"parameters": 5000, "tokens": 30 * 64, "start_tokens": 2 * 64, "ffn_at_once": 4},
                "arms": ["pruned"],
            },
            "staged": {
                "method": "adapt-pruner",
                "ratio": 0.2,
                "stages": 2,
                "slice_optimizer_state": True,
                "iterations": 10,
                "arms": ["pruned"],
            },
        },
        "budgets": {"pruned": [8 * 64], "random": [8 * 64, "equal-total-tokens"]},
        "train": {
            "sequence_length": 16,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "validations": 2,
            "validation_samples": 8,
            "checkpoints": 1,
            "distill": {"arms": ["pruned"]},
        },
        "evaluate": {"samples": 8, "sequence_length": 16, "tasks": ["continuation"], "task_limit": 4},
    }


def make(folder: Path) -> None:
    """Make the run in ``folder`` with today's code; takes minutes, as it trains."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "vocab_size": _VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    make_exact_llama(folder / "parent", torch.bfloat16, **sizes, **heads, max_position_embeddings=64)
    os.utime(make_text(folder / "corpus.jsonl", _VOCAB), (0, 0))  # as it is extracted; a run notices a newer text
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(), sort_keys=False))
    _pvs(folder, "run", "recipe.yaml", "--out", "run")
    for checkpoint in [*folder.glob("run/masks/*/run/nemo/checkpoints/step=*")]:
        _pvs(folder, "convert", checkpoint, "weights", "--to", "nemo")  # without the optimizer's state and paths
        shutil.rmtree(checkpoint)
        (folder / "weights").rename(checkpoint)


def _pvs(folder: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "nemo_pvs.cli", *map(str, arguments)], cwd=folder, check=True)


def pack(folder: Path) -> None:
    """Write what ``make`` has made as the archive, but for logs, caches and checkpoints that nothing reads again."""
    place = str(folder.resolve()).encode()
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not path.is_file() or any(name.match(pattern) for pattern in _LEFT_OUT) or _is_trained(name):
                continue
            content = path.read_bytes()
            if path.suffix == ".json":
                content = content.replace(place, _RECORDED_AT.encode())
            entry = tarfile.TarInfo(str(name))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _is_trained(name: Path) -> bool:
    """Whether a file is of a checkpoint that only a training that goes on would read."""
    return "train" in name.parts and "nemo" in name.parts


def unpack(folder: Path) -> Path:
    """Extract the archive into ``folder``, and return ``folder``.

    Records name the parent by its absolute path, so that a run folder cannot be moved without its recipe's parent;
    here the path is rewritten, as if the run had been made in ``folder``.
    """
    with tarfile.open(ARCHIVE) as archive:
        # Python 3.11.2 has no filters yet.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for path in folder.rglob("*.json"):
        text = path.read_text()
        if _RECORDED_AT in text:
            path.write_text(text.replace(_RECORDED_AT, str(folder.resolve())))
    return folder
