"""The parent stage of ``pvs run``: the model to prune as a checkpoint folder, and whether the recipe can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.assets import asset_files, copy_asset
from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.parent import prepare_parent
from nemo_pvs.checkpoints.source import fingerprint
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.files import sha256_json, whole_folder, write_json
from nemo_pvs.layout import Layout
from nemo_pvs.recipe_distillation import PARENT
from nemo_pvs.recipe_targets import check_recipe
from nemo_pvs.recipe_teacher import check_recipe_teacher, check_tokens
from nemo_pvs.run_folder import RunFolder


def get_parent(run: RunFolder) -> None:
    """Get the parent as a checkpoint folder, and check that the recipe can be done with it.

    Raises:
        UserError: it is not what the recipe says, or cannot be pruned or trained as that asks.
    """
    parent, target = run.recipe.parent, run.folder / "parent"
    source = parent.source
    if source is None:
        assert parent.config is not None
        assert parent.tokenizer is not None
        inputs: dict[str, Any] = {"config": parent.config, "tokenizer": tokenizer_hash(Path(parent.tokenizer))}
        run.stage("parent", inputs, [target], lambda: _describe(run))
    else:
        given = Path(source).is_dir()
        inputs = {"source": source, "fingerprint": fingerprint(open_source(source)) if given else None}

        def work() -> dict[str, Any]:
            path = prepare_parent(source, target)
            place = str(path.resolve()) if given else "parent"
            return {"path": place, "fingerprint": fingerprint(open_source(path))}

        run.stage("parent", inputs, [] if given else [target], work)
    _check(run)
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
