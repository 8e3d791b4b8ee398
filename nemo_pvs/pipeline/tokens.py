"""The tokens of a run: tokenised from the recipe's text into the run folder, or token files that the recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.data.corpus import Document, input_files, read_documents
from nemo_pvs.data.split import split_documents
from nemo_pvs.data.token_counts import counts_of_token_file
from nemo_pvs.data.token_files import check_end, describe_token_file, token_file_hash
from nemo_pvs.data.token_set import TokenSet, check_length
from nemo_pvs.data.tokenize import tokenize, tokenizer_hash
from nemo_pvs.data.windows import validation_windows, write_validation_document
from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.records import DataRecord, SplitTokens
from nemo_pvs.planning.checks import check_domains_end
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.files import sha256_bytes, sha256_json
from nemo_pvs.system.progress import progress

Splits = Mapping[str, SplitTokens]
"""Keys are train, validation, calibration and test."""
Descriptions = dict[str, dict[str, Any]]
"""The same as plain data: ``tokens`` and ``bin_sha256``, and ``files`` if there are several."""


class RunData:
    """The token files of each split."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.folder = folder
        self._recipe = recipe
        self._data = recipe.data

    def prefix(self, split: str, domain: str | None = None) -> Path:
        """Return the path prefix of a split's token file, or of one domain's; see ``training_paths`` for training."""
        token_files = self._data.token_files
        if token_files is None:
            return self.folder / (f"{split}-{domain}" if domain else split)
        files = getattr(token_files, split)
        return Path(files[domain] if domain else files)

    @property
    def training_paths(self) -> str | list[str] | dict[str, str]:
        """The training files in the form of ``TrainingJob.data``."""
        if self._data.domains:
            return {name: str(self.prefix("train", name).resolve()) for name in self._data.domains}
        if self._data.token_files is None:
            return str(self.folder.resolve() / "train")
        weights, paths = self._data.token_files.blend
        files = [str(Path(path).resolve()) for path in paths]
        if weights is None:
            return files
        return [entry for pair in zip(map(str, weights), files, strict=True) for entry in pair]

    def token_counts(self, vocab: int) -> torch.Tensor:
        """Return how often each token occurs in the training text, int64 [vocab]."""
        domains = self._data.domains
        prefixes = [self.prefix("train", name) for name in domains] if domains else [self.prefix("train")]
        return torch.stack([counts_of_token_file(prefix, vocab) for prefix in prefixes]).sum(dim=0)

    @property
    def validation_paths(self) -> str | dict[str, str]:
        """The files of the validation windows in the form of ``TrainingJob.data``."""
        prefix = self.folder.resolve() / "validation_windows"
        return {name: f"{prefix}-{name}" for name in self._data.domains} or str(prefix)

    @property
    def validation_windows(self) -> TokenSet:
        """The windows that every validation loss is measured on; with domains, equally many of each, concatenated."""
        if not self._data.domains:
            return self._windows()
        parts = [self._windows(name) for name in self._data.domains]
        ids = torch.cat([part.ids for part in parts])
        manifest = {
            **parts[0].manifest,
            "data_set": "validation",
            "domains": self._data.domains,
            "samples": len(ids),
            "ids_sha256": sha256_bytes(ids.numpy().tobytes()),
        }
        return TokenSet(ids, manifest)

    def _write_validation_windows(self, vocab: int) -> dict[str, Any]:
        """Write the validation windows for Megatron, and return their manifest."""
        paths = self.validation_paths
        if isinstance(paths, str):
            write_validation_document(self._windows(), Path(paths), vocab)
        else:
            for name, path in paths.items():
                write_validation_document(self._windows(name), Path(path), vocab)
        return self.validation_windows.manifest

    def _windows(self, domain: str | None = None) -> TokenSet:
        train = self._recipe.train
        return validation_windows(
            self.prefix("validation", domain), samples=train.validation_samples, sequence_length=train.sequence_length
        )

    def identity(self, tokenizer: Path, vocab: int) -> dict[str, Any]:
        """Return the identity of the text: sizes and times of source files, or hashes of token files.

        Args:
            tokenizer: Folder of the parent's tokenizer.
            vocab: Vocabulary size of the parent.

        Raises:
            UserError: a file is missing or of an unknown kind, or a token file was made for another model.
        """
        if self._data.token_files is None:
            assert self._data.source is not None
            return _stat(self._data.source)
        return self._describe(tokenizer_hash(tokenizer), vocab)

    def given(self, tokenizer: Path, vocab: int) -> DataRecord:
        """Describe the token files that the recipe names and the validation windows, without writing anything.

        Raises:
            UserError: a token file is missing, or was made for another model.
        """
        splits = self._describe(tokenizer_hash(tokenizer), vocab)
        return DataRecord(_splits(splits), self.validation_windows.manifest)

    def prepare(self, tokenizer: Path, vocab: int) -> DataRecord:
        """Tokenise the text, split by document, unless there are token files; write the validation windows."""
        if self._data.token_files is not None:
            splits = self._describe(tokenizer_hash(tokenizer), vocab)
        else:
            splits = self._tokenise(tokenizer)
        return DataRecord(_splits(splits), self._write_validation_windows(vocab))

    def _tokenise(self, tokenizer: Path) -> Descriptions:
        """Tokenise the text, split by document; return a description of each split."""
        files = {}
        with progress("tokenise", "documents") as show:
            for name, documents in self._texts().items():
                files[name] = tokenize(documents, tokenizer, self.folder / name, progress=show)
        for split in ("train", "validation") if self._data.domains else ():
            files[split] = _together([files.pop(f"{split}-{domain}") for domain in self._data.domains])
        return files

    def _texts(self) -> dict[str, list[Document]]:
        """Return the documents of every token file to be made, by the file's name."""
        source, shares, seed = self._data.source, self._data.split.model_dump(), self._data.seed
        if not isinstance(source, dict):
            assert source is not None
            return split_documents(list(read_documents(source)), shares, seed=seed)
        texts: dict[str, list[Document]] = {"calibration": [], "test": []}
        divided: dict[str, str] = {}  # no test text of one domain may be a training text of another
        for domain, files in source.items():
            try:
                parts = split_documents(list(read_documents(files)), shares, seed=seed, divided=divided)
            except UserError as error:
                raise UserError(f"Domain {domain}: {error}") from None
            for split, part in parts.items():
                texts.setdefault(split if split in texts else f"{split}-{domain}", []).extend(part)
        return texts

    @property
    def text_hashes(self) -> dict[str, str]:
        """The hashes of the tokens of ``evaluate.texts``, by name."""
        return {name: token_file_hash(Path(prefix)) for name, prefix in self._recipe.evaluate.texts.items()}

    def check_texts(self, tokenizer: Path, vocab: int) -> None:
        """Refuse ``evaluate.texts`` that are missing, made for another model, or too short.

        Raises:
            UserError: naming the text.
        """
        settings = self._recipe.evaluate
        for name, prefix in settings.texts.items():
            try:
                tokens = describe_token_file(Path(prefix), tokenizer_hash(tokenizer), vocab)["tokens"]
                check_length(tokens, samples=settings.samples, sequence_length=settings.sequence_length, data_set=name)
            except UserError as error:
                raise UserError(f"evaluate.texts.{name}: {error}") from None

    def training_file(self, splits: Splits) -> str | None:
        """Return the hash of the training file; None if several are blended, or with domains."""
        files = splits["train"].files
        return files[0].sha256 if len(files) == 1 and not self._data.domains else None

    def check_end(self, splits: Splits, end: int) -> None:
        """Refuse to read the first ``end`` tokens of the training data if there are fewer.

        Raises:
            UserError: saying how many tokens are missing.
        """
        if self._data.domains:
            files = zip(self._data.domains, splits["train"].files, strict=True)
            check_domains_end(self._recipe, {name: file.tokens for name, file in files}, end)
            return
        length = self._recipe.train.sequence_length
        if self._data.token_files is None:
            check_end(end, length, [splits["train"].tokens], None, ["train"])
            return
        weights, names = self._data.token_files.blend
        check_end(end, length, [file.tokens for file in splits["train"].files], weights, names)

    def _describe(self, tokenizer_sha256: str, vocab: int) -> Descriptions:
        token_files = self._data.token_files
        assert token_files is not None
        _, train = token_files.blend
        files = [describe_token_file(Path(path), tokenizer_sha256, vocab) for path in train]
        named = token_files.validation
        paths = [Path(path) for path in (named.values() if isinstance(named, dict) else [named])]
        validation = [describe_token_file(path, tokenizer_sha256, vocab) for path in paths]
        return {
            "train": _together(files),
            "validation": _together(validation) if self._data.domains else validation[0],
            **{
                name: describe_token_file(self.prefix(name), tokenizer_sha256, vocab)
                for name in ("calibration", "test")
            },
        }


def _splits(descriptions: Descriptions) -> dict[str, SplitTokens]:
    return {name: SplitTokens(description) for name, description in descriptions.items()}


def _together(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the descriptions of several token files into one."""
    return {
        "tokens": sum(file["tokens"] for file in files),
        "bin_sha256": sha256_json([file["bin_sha256"] for file in files]),
        "files": files,
    }


def _stat(source: str | list[str] | Mapping[str, str | list[str]]) -> dict[str, list[int]]:
    """Return the size and modification time of every source file, so that a changed corpus is tokenised again.

    Raises:
        UserError: an input is missing or of an unknown kind.
    """
    parts = source.values() if isinstance(source, Mapping) else [source]
    names = [name for part in parts for name in ([part] if isinstance(part, str) else part)]
    files = [file for file in input_files(names) if file is not None]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
