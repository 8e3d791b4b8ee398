"""The parent stage: the model to prune as a checkpoint folder, and the checks of the recipe against it."""

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
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.planning.parent_checks import check_dense_parent
from nemo_pvs.planning.targets import check_recipe
from nemo_pvs.planning.teacher import check_recipe_teacher, check_tokens
from nemo_pvs.pruning.vocabulary.choice import check_vocabulary_size
from nemo_pvs.pruning.vocabulary.tokenizer import BpeTokenizer
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.recipe.options import vocabulary_of
from nemo_pvs.system.files import sha256_json, whole_folder, write_json


def parent(run: RunFolder) -> Stage[ParentRecord]:
    """Return the stage that gets the parent as a checkpoint folder.

    Raises:
        UserError: the recipe's parent does not exist.
    """
    source = run.recipe.parent.source
    return _untrained(run) if source is None else _checkpoint(run, source)


def _untrained(run: RunFolder) -> Stage[ParentRecord]:
    """Return the stage that writes the config and the tokenizer of a parent that has not been trained yet."""
    given, target = run.recipe.parent, run.folder / "parent"
    assert given.tokenizer is not None
    tokenizer = Path(given.tokenizer)
    record = ParentRecord("parent", sha256_json(given.config))

    def work() -> ParentRecord:
        with whole_folder(target) as partial:
            write_json(partial / "config.json", given.config)
            for asset in asset_files(tokenizer):
                copy_asset(asset, partial)
        return record

    return Stage(
        name="parent",
        record=ParentRecord,
        inputs=lambda: {"config": given.config, "tokenizer": tokenizer_hash(tokenizer)},
        work=work,
        outputs=[target],
        known=lambda: record,
    )


def _checkpoint(run: RunFolder, source: str) -> Stage[ParentRecord]:
    """Return the stage that uses a local checkpoint folder as it is, or fetches the checkpoint."""
    target = run.folder / "parent"
    given = fingerprint(open_source(source)) if Path(source).is_dir() else None
    inputs = {"source": source, "fingerprint": given}

    def work() -> ParentRecord:
        path = prepare_parent(source, target)
        return ParentRecord(str(path.resolve()) if given else "parent", fingerprint(open_source(path)))

    def known() -> ParentRecord | None:
        begun = run.stages.begun("parent")
        if "result" in begun and run.stages.matches(begun, inputs):
            record = ParentRecord.from_json(begun["result"])
            if (run.folder / record.path).exists():
                return record
        return ParentRecord(str(Path(source).resolve()), given) if given else None

    return Stage(
        name="parent",
        record=ParentRecord,
        inputs=lambda: inputs,
        work=work,
        outputs=[] if given else [target],
        known=known,
    )


def check_parent(run: RunFolder) -> None:
    """Refuse a parent that does not match the recipe, or that cannot be pruned or trained as in the recipe.

    Raises:
        UserError: naming what does not match.
    """
    _check(run)
    if run.recipe.parent.source:
        check_dense_parent(run.recipe, run.parent_source)
        _check_vocabularies(run)
    check_recipe(run.recipe, run.parent_shape, run.parent_config)
    check_recipe_teacher(run.recipe, run.parent_shape)
    distill = run.recipe.train.distill
    if distill and distill.teacher != PARENT:
        check_tokens(Path(distill.teacher), run.tokenizer)


def _check_vocabularies(run: RunFolder) -> None:
    for name, target in run.recipe.targets.items():
        size = vocabulary_of(target)
        if size is not None:
            try:
                check_vocabulary_size(BpeTokenizer(run.parent_source.assets, run.parent_config), size)
            except UserError as error:
                raise UserError(f"Target {name}: {error}") from None


def _check(run: RunFolder) -> None:
    stated = run.recipe.parent.normal_config
    if stated is not None and Layout.for_config(stated).shape(stated) != run.parent_shape:
        raise UserError(
            f"parent.config of the recipe is [{Layout.for_config(stated).shape(stated)}], but "
            f"{run.recipe.parent.name} is [{run.parent_shape}]; fix one of them, or leave parent.config out."
        )
    tokens = len(load_tokenizer(run.tokenizer))
    if tokens > run.parent_shape.vocab:
        raise UserError(
            f"The tokenizer in {run.tokenizer} has {tokens:,} tokens, but the parent's vocabulary has "
            f"{run.parent_shape.vocab:,}; give the tokenizer that belongs to the parent."
        )
