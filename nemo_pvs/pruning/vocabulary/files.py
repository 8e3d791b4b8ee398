"""Writes a tokenizer's files for a smaller vocabulary: the kept tokens, renumbered in their old order."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.vocabulary.tokenizer import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER,
    BpeTokenizer,
    post_processors,
)
from nemo_pvs.system.files import read_json, write_json, write_text

NewIds = Mapping[int, int]
"""The new id of each kept token by its old id."""

_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_LISTS_OF_LISTS = ("bad_words_ids",)
_UNSUPPORTED = ("sequence_bias", "forced_decoder_ids")
"""Keys of a config that hold ids in a form that is not renumbered."""


def new_ids(kept: Sequence[int]) -> NewIds:
    """Return the new id of each kept token; the order stays."""
    return {old: new for new, old in enumerate(kept)}


def write_tokenizer(tokenizer: BpeTokenizer, kept: Sequence[int], folder: Path) -> None:
    """Write a tokenizer's files with only the kept tokens, and the generation config with their ids.

    Files without ids are copied. What only repeats the vocabulary in another format (``tokenizer.model``,
    ``tekken.json``) is left out; ``vocab.json`` and ``merges.txt`` are rewritten.

    Args:
        tokenizer: The old tokenizer; every id of ``required`` must be kept.
        kept: Old ids, ascending.
        folder: An existing folder.

    Raises:
        UserError: the generation config has ids in a form that is not supported.
    """
    new = new_ids(kept)
    content = pruned_tokenizer(tokenizer, new)
    write_json(folder / TOKENIZER, content)
    for name, file in tokenizer.files.items():
        if name == TOKENIZER_CONFIG:
            write_json(folder / name, _pruned_config(read_json(file), new))
        elif name == GENERATION_CONFIG:
            write_json(folder / name, renumbered(read_json(file), new, name))
        elif name == "added_tokens.json":
            added = read_json(file).items()
            write_json(folder / name, {token: new[index] for token, index in added if index in new})
        elif name == "vocab.json":
            write_json(folder / name, content["model"]["vocab"])
        elif name == "merges.txt":
            lines = ["#version: 0.2", *(" ".join(pair) for pair in content["model"]["merges"])]
            write_text(folder / name, "\n".join(lines) + "\n")
        elif name in (SPECIAL_TOKENS, "chat_template.json") or file.suffix == ".jinja":
            # Additional chat templates have a folder of their own.
            parent = folder if file.parent == tokenizer.path.parent else folder / file.parent.name
            parent.mkdir(exist_ok=True)
            shutil.copyfile(file, parent / name)


def pruned_tokenizer(tokenizer: BpeTokenizer, new: NewIds) -> dict[str, Any]:
    """Return ``tokenizer.json`` with the kept tokens, the merges among them, and their new ids."""
    content = copy.deepcopy(tokenizer.content)
    vocab = {token: new[index] for token, index in tokenizer.vocab.items() if index in new}
    merges = []
    for left, right in tokenizer.merges:
        if {left, right, left + right} <= vocab.keys():
            merges.append([left, right])
    content["model"] |= {"vocab": vocab, "merges": merges}
    for token in content.get("added_tokens", []):
        token["id"] = new[token["id"]]
    for processor in post_processors(content):
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [new[index] for index in special["ids"]]
        for key in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
            if key in processor:
                token, index = processor[key]
                processor[key] = [token, new[index]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    return content


def renumbered(config: Mapping[str, Any], new: NewIds, file: str) -> dict[str, Any]:
    """Return the content of a config file with the new ids; ids of removed tokens are left out.

    Args:
        config: The content.
        new: The new ids.
        file: The file's name, for messages.

    Raises:
        UserError: it has ids in a form that is not supported.
    """
    values = dict(config)
    for key, value in config.items():
        if key in _UNSUPPORTED and value:
            raise UserError(f"{file} has {key}, whose tokens cannot be renumbered; remove the key.")
        if key.endswith("_token_id") and isinstance(value, int):
            values[key] = new.get(value, value)
        elif isinstance(value, list) and (key.endswith(("_token_id", "_token_ids")) or key in _LISTS):
            values[key] = _kept(value, new)
        elif isinstance(value, list) and key in _LISTS_OF_LISTS:
            values[key] = [_kept(words, new) for words in value if new.keys() >= {*words}]
    return values


def _kept(ids: Iterable[int], new: NewIds) -> list[int]:
    return [new[index] for index in ids if index in new]


def _pruned_config(config: Mapping[str, Any], new: NewIds) -> dict[str, Any]:
    values = renumbered(config, new, TOKENIZER_CONFIG)
    if "added_tokens_decoder" in values:
        added = values["added_tokens_decoder"].items()
        values["added_tokens_decoder"] = {str(new[int(index)]): token for index, token in added}
    return values
