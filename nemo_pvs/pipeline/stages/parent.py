"""The parent stage of ``pvs run``: the model to prune as a checkpoint folder, and whether the recipe can be done."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.assets import asset_files, copy_asset
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import ParentRecord
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.planning.parent_checks import check_dense_parent
from nemo_pvs.planning.targets import check_recipe
from nemo_pvs.planning.teacher import check_recipe_teacher, check_tokens
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.system.files import sha256_json, whole_folder, write_json


def parent(run: RunFolder) -> Stage[ParentRecord]:
    """Return the stage that gets the parent as a checkpoint folder.

    Raises:
        UserError: the recipe's parent is not there.
    """
    source, target = run.recipe.parent.source, run.folder / "parent"
    inputs = _inputs(run)
    given = source is not None and inputs["fingerprint"] is not None

    def work() -> ParentRecord:
        if source is None:
            return _describe(run)
        path = prepare_parent(source, target)
        return ParentRecord(str(path.resolve()) if given else "parent", fingerprint(open_source(path)))

    return Stage(
        name="parent",
        record=ParentRecord,
        inputs=lambda: inputs,
        work=work,
        outputs=[] if given else [target],
        known=lambda: _known(run, inputs),
    )


def _inputs(run: RunFolder) -> Inputs:
    """Return what the parent depends on; the fingerprint of one that must be fetched is not known."""
    parent = run.recipe.parent
    if parent.source is None:
        assert parent.tokenizer is not None
        return {"config": parent.config, "tokenizer": tokenizer_hash(Path(parent.tokenizer))}
    given = Path(parent.source).is_dir()
    return {"source": parent.source, "fingerprint": fingerprint(open_source(parent.source)) if given else None}


def _known(run: RunFolder, inputs: Inputs) -> ParentRecord | None:
    """Return the parent if it is known before any work; None if it must be fetched first."""
    source, begun = run.recipe.parent.source, run.stages.begun("parent")
    if "result" in begun and run.stages.matches(begun, inputs):
        record = ParentRecord.from_json(begun["result"])
        if (run.folder / record.path).exists():
            return record
    if source is None:
        return ParentRecord("parent", sha256_json(run.recipe.parent.config))
    if inputs["fingerprint"] is not None:
        return ParentRecord(str(Path(source).resolve()), inputs["fingerprint"])
    return None


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


def _describe(run: RunFolder) -> ParentRecord:
    """Put down the config and the tokenizer of a parent that is yet to be trained."""
    parent = run.recipe.parent
    with whole_folder(run.folder / "parent") as partial:
        write_json(partial / "config.json", parent.config)
        for asset in asset_files(Path(str(parent.tokenizer))):
            copy_asset(asset, partial)
    return ParentRecord("parent", sha256_json(parent.config))


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
