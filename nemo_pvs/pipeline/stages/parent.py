"""The parent stage of ``pvs run``: the model to prune as a checkpoint folder, and whether the recipe can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.assets import asset_files, copy_asset
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.planning.parent_checks import check_dense_parent
from nemo_pvs.planning.targets import check_recipe
from nemo_pvs.planning.teacher import check_recipe_teacher, check_tokens
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.system.files import sha256_json, whole_folder, write_json


def parent_inputs(run: RunFolder) -> dict[str, Any]:
    """Return what the parent stage depends on.

    Raises:
        UserError: the recipe's parent is not there.
    """
    parent = run.recipe.parent
    if parent.source is None:
        assert parent.tokenizer is not None
        return {"config": parent.config, "tokenizer": tokenizer_hash(Path(parent.tokenizer))}
    given = Path(parent.source).is_dir()
    return {"source": parent.source, "fingerprint": fingerprint(open_source(parent.source)) if given else None}


def known_parent(run: RunFolder) -> dict[str, Any] | None:
    """Return what the parent stage results in if that is known before any work; None if it must be fetched first."""
    parent, inputs, begun = run.recipe.parent, parent_inputs(run), run.stages.begun("parent")
    if "result" in begun and run.stages.matches(begun, inputs) and (run.folder / begun["result"]["path"]).exists():
        return dict(begun["result"])
    if parent.source is None:
        return {"path": "parent", "fingerprint": sha256_json(parent.config)}
    if inputs["fingerprint"] is not None:
        return {"path": str(Path(parent.source).resolve()), "fingerprint": inputs["fingerprint"]}
    return None


def get_parent(run: RunFolder) -> None:
    """Get the parent as a checkpoint folder.

    Raises:
        UserError: it cannot be had.
    """
    source, target, inputs = run.recipe.parent.source, run.folder / "parent", parent_inputs(run)
    if source is None:
        run.stage("parent", inputs, [target], lambda: _describe(run))
        return
    given = inputs["fingerprint"] is not None

    def work() -> dict[str, Any]:
        path = prepare_parent(source, target)
        place = str(path.resolve()) if given else "parent"
        return {"path": place, "fingerprint": fingerprint(open_source(path))}

    run.stage("parent", inputs, [] if given else [target], work)


def check_parent(run: RunFolder) -> None:
    """Refuse a parent that is not what the recipe says, or that cannot be pruned or trained as it asks.

    Raises:
        UserError: naming what does not fit.
    """
    _check(run)
    if run.recipe.parent.source:
        check_dense_parent(run.recipe, run.parent_source)
    check_recipe(run.recipe, run.parent_shape, int(run.parent_config.get("max_position_embeddings", 0)))
    check_recipe_teacher(run.recipe, run.parent_shape)
    distill = run.recipe.train.distill
    if distill and distill.teacher != PARENT:
        check_tokens(Path(distill.teacher), run.tokenizer)


def _describe(run: RunFolder) -> dict[str, Any]:
    """Put down the config and the tokenizer of a parent that is yet to be trained."""
    parent = run.recipe.parent
    with whole_folder(run.folder / "parent") as partial:
        write_json(partial / "config.json", parent.config)
        for asset in asset_files(Path(str(parent.tokenizer))):
            copy_asset(asset, partial)
    return {"path": "parent", "fingerprint": sha256_json(parent.config)}


def _check(run: RunFolder) -> None:
    stated = run.recipe.parent.normal_config
    if stated is not None and Layout.for_config(stated).shape(stated) != run.parent_shape:
        raise UserError(
            f"parent.config of the recipe is [{Layout.for_config(stated).shape(stated)}], but "
            f"{run.recipe.parent.name} is [{run.parent_shape}]; mend one of them, or leave parent.config out."
        )
    tokens = len(load_tokenizer(run.tokenizer))
    if tokens > run.parent_shape.vocab:
        raise UserError(
            f"The tokenizer in {run.tokenizer} has {tokens:,} tokens, but the parent's vocabulary has "
            f"{run.parent_shape.vocab:,}; give the tokenizer that belongs to the parent."
        )
