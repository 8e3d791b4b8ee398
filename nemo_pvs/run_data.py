"""The tokens of a run: made of the recipe's text in the run's folder, or token files that the recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.data.corpus import WIKIPEDIA_SAMPLE, read_documents
from nemo_pvs.data.split import split_documents
from nemo_pvs.data.token_files import check_end, describe_token_file
from nemo_pvs.data.tokenize import tokenize, tokenizer_hash
from nemo_pvs.evaluation.windows import validation_windows
from nemo_pvs.files import sha256_json
from nemo_pvs.progress import progress
from nemo_pvs.recipe import Recipe

Splits = dict[str, Any]
"""For train, validation, calibration and test: ``tokens`` and ``bin_sha256``; for train also ``files`` if several."""


class RunData:
    """Where the tokens of each split are, and what is known about them."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.folder = folder
        self._recipe = recipe
        self._data = recipe.data

    def prefix(self, split: str) -> Path:
        """Return the token file of a split but the training split, which may be several."""
        token_files = self._data.token_files
        return Path(getattr(token_files, split)) if token_files else self.folder / split

    @property
    def training_paths(self) -> str | list[str]:
        """The training files as ``TrainingJob.data`` takes them."""
        if self._data.token_files is None:
            return str(self.folder.resolve() / "train")
        weights, paths = self._data.token_files.blend
        files = [str(Path(path).resolve()) for path in paths]
        if weights is None:
            return files
        return [entry for pair in zip(map(str, weights), files, strict=True) for entry in pair]

    @property
    def validation_windows(self) -> TokenSet:
        """The windows that every validation loss is measured on."""
        training = self._recipe.train
        return validation_windows(
            self.prefix("validation"), samples=training.validation_samples, sequence_length=training.sequence_length
        )

    def identity(self, tokenizer: Path, vocab: int) -> dict[str, Any]:
        """Return what changes when the text does: of token files what is in them, after a look whether they suit.

        Raises:
            UserError: a token file is missing, or was made for another model.
        """
        if self._data.token_files is None:
            assert self._data.source is not None
            return _stat(self._data.source)
        return self._describe(tokenizer_hash(tokenizer), vocab)

    def prepare(self, tokenizer: Path, vocab: int) -> Splits:
        """Tokenise the text, split by document, unless that is done; return what is in each split."""
        if self._data.token_files is not None:
            return self._describe(tokenizer_hash(tokenizer), vocab)
        assert self._data.source is not None
        documents = list(read_documents(self._data.source))
        splits = split_documents(documents, self._data.split.model_dump(), seed=self._data.seed)
        made = {}
        with progress("tokenise", "documents") as show:
            for name, part in splits.items():
                made[name] = tokenize(part, tokenizer, self.folder / name, progress=show)
        return made

    def training_file(self, splits: Splits) -> str | None:
        """Return the hash of the training file; None where several are blended."""
        files = splits["train"].get("files", [splits["train"]])
        return str(files[0]["bin_sha256"]) if len(files) == 1 else None

    def check_end(self, splits: Splits, end: int) -> None:
        """Refuse to read ``end`` tokens from the start of the training data if there are fewer.

        Raises:
            UserError: saying how many tokens are missing.
        """
        if self._data.token_files is None:
            check_end(end, [splits["train"]["tokens"]], None, ["train"])
            return
        weights, names = self._data.token_files.blend
        check_end(end, [file["tokens"] for file in splits["train"]["files"]], weights, names)

    def _describe(self, tokenizer_sha256: str, vocab: int) -> Splits:
        token_files = self._data.token_files
        assert token_files is not None
        _, train = token_files.blend
        files = [describe_token_file(Path(path), tokenizer_sha256, vocab) for path in train]
        return {
            "train": {
                "tokens": sum(file["tokens"] for file in files),
                "bin_sha256": sha256_json([file["bin_sha256"] for file in files]),
                "files": files,
            },
            **{
                name: describe_token_file(self.prefix(name), tokenizer_sha256, vocab)
                for name in ("validation", "calibration", "test")
            },
        }


def _stat(source: str | list[str]) -> dict[str, list[int]]:
    """Return size and time of change of every input file, so that a changed corpus is tokenised again."""
    names = [source] if isinstance(source, str) else source
    paths = [Path(name) for name in names if name != WIKIPEDIA_SAMPLE]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}
