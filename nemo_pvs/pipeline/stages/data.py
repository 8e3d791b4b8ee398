"""The data stage: the text as token files, and the fixed validation windows."""

from __future__ import annotations

from typing import Any

from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import DataRecord
from nemo_pvs.pipeline.stage import Inputs, Stage


def data(run: RunFolder) -> Stage[DataRecord]:
    """Return the stage that tokenises the text, unless there are token files, and fixes the validation windows."""

    def vocab() -> int:
        return run.parent_shape.vocab

    def inputs() -> Inputs:
        train = run.recipe.train
        return {
            "source": run.recipe.data.model_dump(exclude={"token_ranges"}),
            "files": run.tokens.identity(run.tokenizer, vocab()),
            "tokenizer": tokenizer_hash(run.tokenizer),
            "validation": [train.validation_samples, train.sequence_length],
        }

    def known() -> DataRecord:
        return run.tokens.given(run.tokenizer, vocab())

    return Stage(
        name="data",
        record=DataRecord,
        inputs=inputs,
        work=lambda: run.tokens.prepare(run.tokenizer, vocab()),
        outputs=[run.tokens.folder],
        after=["parent"],
        known=known if run.recipe.data.token_files else None,
        decisive=_decisive,
    )


def _decisive(inputs: Inputs) -> Any:
    """Return what certainly changes the tokens: not where the files are, nor when they were written."""
    files = inputs["files"].values()
    sizes = [file[0] if isinstance(file, list) else file for file in files]  # else a token file
    return [sizes, inputs["source"]["split"], inputs["source"]["seed"], inputs["tokenizer"], inputs["validation"]]
