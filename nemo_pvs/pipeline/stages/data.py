"""The data stages: the text as token files, and the fixed validation windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.pipeline.folder import HUGGING_FACE, RunFolder
from nemo_pvs.pipeline.records import DataRecord, data_stage, prune_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.pipeline.tokens import RunData


def data(run: RunFolder) -> Stage[DataRecord]:
    """Return the stage that tokenises the text, unless there are token files, and fixes the validation windows."""

    def known() -> DataRecord:
        return run.tokens.given(run.tokenizer, run.parent_shape.vocab)

    return _tokenised(
        run,
        data_stage(),
        run.tokens,
        tokenizer=lambda: run.tokenizer,
        vocab=lambda: run.parent_shape.vocab,
        after=["parent"],
        known=known if run.recipe.data.token_files else None,
    )


def retokenise(run: RunFolder, name: str) -> Stage[DataRecord]:
    """Return the stage that tokenises the text again, with the tokens that a target keeps."""
    pruned = run.pruned(name) / HUGGING_FACE
    return _tokenised(
        run,
        data_stage(name),
        run.tokens_of(name),
        tokenizer=lambda: pruned,
        vocab=lambda: shape_of(open_source(pruned)).vocab,
        after=[prune_stage(name)],
        reads=[pruned],
    )


def _tokenised(
    run: RunFolder,
    stage: str,
    tokens: RunData,
    *,
    tokenizer: Callable[[], Path],
    vocab: Callable[[], int],
    after: Sequence[str],
    reads: Sequence[Path] = (),
    known: Callable[[], DataRecord] | None = None,
) -> Stage[DataRecord]:
    def inputs() -> Inputs:
        train = run.recipe.train
        return {
            "source": run.recipe.data.model_dump(exclude={"token_ranges"}),
            "files": tokens.identity(tokenizer(), vocab()),
            "tokenizer": tokenizer_hash(tokenizer()),
            "validation": [train.validation_samples, train.sequence_length],
        }

    return Stage(
        name=stage,
        record=DataRecord,
        inputs=inputs,
        work=lambda: tokens.prepare(tokenizer(), vocab()),
        outputs=[tokens.folder],
        after=after,
        reads=reads,
        known=known,
        decisive=_decisive,
    )


def _decisive(inputs: Inputs) -> Any:
    """Return what certainly changes the tokens: not where the files are, nor when they were written."""
    files = inputs["files"].values()
    sizes = [file[0] if isinstance(file, list) else file for file in files]  # else a token file
    return [sizes, inputs["source"]["split"], inputs["source"]["seed"], inputs["tokenizer"], inputs["validation"]]
