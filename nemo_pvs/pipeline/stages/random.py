"""The random stage: random initial weights for the from-scratch baseline, with a target's shape and masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.fingerprint import fingerprint, function_of
from nemo_pvs.checkpoints.masks import NoMasks, masks_of
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.data.assets import asset_files
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.folder import HUGGING_FACE, NEMO, RunFolder
from nemo_pvs.pipeline.records import RandomRecord, prune_stage, random_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.options import is_sparse, vocabulary_of
from nemo_pvs.recipe.target import DENSE, Target


def random(run: RunFolder, name: str, target: Target) -> Stage[RandomRecord]:
    """Return the stage that draws the random weights of a target, as a NeMo checkpoint."""
    train, folder, pruned = run.recipe.train, run.folder / "random" / name, run.pruned(name) / HUGGING_FACE
    from_shape = _needs_shape_only(run, name, target)

    def shape_and_masks() -> tuple[Shape, bool]:
        """Return the shape, and whether there are masks."""
        if from_shape:
            return expected_shape(target, run.parent_shape).shape, False
        source = open_source(pruned)
        return shape_of(source), bool(masks_of(source).names)

    def inputs() -> Inputs:
        shape, masked = shape_and_masks()
        return {
            "shape": shape.to_dict(),
            "constants": _constants(run.parent_config),
            "seed": train.seed,
            **({"initialisation": train.initialisation} if train.initialisation != "megatron" else {}),
            **(
                {"pruned": [run.records.pruned(name).fingerprint, target.keep_parent_embeddings]}
                if masked or target.keep_parent_embeddings
                else {}
            ),
        }

    def work() -> RandomRecord:
        drawn = _draw(run, target, pruned)
        write_nemo(drawn, folder / NEMO)
        return RandomRecord(fingerprint(open_source(folder / NEMO)))

    return Stage(
        name=random_stage(name),
        record=RandomRecord,
        inputs=inputs,
        work=work,
        outputs=[folder],
        after=["parent"] if from_shape else [prune_stage(name)],
        reads=[] if from_shape else [pruned],
        shared=True,
    )


def _draw(run: RunFolder, target: Target, pruned: Path) -> RandomSource:
    """Return the random weights, for the parent's own architecture or for that of the pruned target."""
    seed, scheme = run.recipe.train.seed, run.recipe.train.initialisation
    if target.method == DENSE:
        assets = asset_files(run.tokenizer)
        return RandomSource(run.parent_config, seed, assets, torch.bfloat16, NoMasks(), None, scheme)
    source = open_source(pruned)
    keep = source if target.keep_parent_embeddings else None
    return RandomSource(source.config, seed, source.assets, torch.bfloat16, masks_of(source), keep, scheme)


def _constants(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what random weights depend on besides the shape: the parent's constants, which theirs are."""
    spread = config.get("initializer_range", Layout.for_config(config).defaults.get("initializer_range"))
    function = {key: value for key, value in function_of(config).items() if key != "shape"}
    return {**function, "initializer_range": spread}


def _needs_shape_only(run: RunFolder, name: str, target: Target) -> bool:
    """Return whether the weights depend only on the shape, and the shape is known before the target is pruned."""
    if target.method == DENSE:
        return True
    if vocabulary_of(target) is not None:
        return False  # the tokenizer is known only after pruning
    if prune_stage(name) in run.records or "parent" not in run.records or target.keep_parent_embeddings:
        return False
    masked = is_sparse(target) or bool(masks_of(run.parent_source).names)
    return expected_shape(target, run.parent_shape).exact and not masked
