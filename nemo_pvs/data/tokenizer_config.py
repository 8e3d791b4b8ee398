"""``tokenizer_config.json`` as Transformers 5 writes it, put so that version 4 (and with it NeMo) loads it, too.

Version 5 keeps everything that decides ids in ``tokenizer.json`` and names classes that version 4 lacks
(``TokenizersBackend``), or has under the same name with rules of their own (``LlamaTokenizer``). Version 4's
``PreTrainedTokenizerFast`` takes ``tokenizer.json`` as it is, and version 5 knows that name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pvs.system.files import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"

# What version 5 notes of how the tokenizer was loaded.
_NOTES = ("backend", "is_local", "local_files_only")


def for_both_versions(folder: Path) -> dict[str, Any] | None:
    """Return the ``tokenizer_config.json`` of a folder in words that Transformers 4 and 5 understand.

    Returns:
        None where the file can stay as it is: there is none, or version 5 did not write it.

    Raises:
        UserError: it is no JSON.
    """
    path = folder / TOKENIZER_CONFIG
    if not path.is_file() or not (folder / _TOKENIZER).is_file():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or not _is_of_version_5(values):
        return None
    values = {key: value for key, value in values.items() if key not in _NOTES}
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = values.pop("extra_special_tokens", None)
    if isinstance(special, list):
        values["additional_special_tokens"] = special
    named = values.pop("model_specific_special_tokens", None) or (special if isinstance(special, dict) else None)
    if named:
        values["extra_special_tokens"] = named
    # Version 4 sets this in the tokenizer, to False where it is left out.
    values.pop("add_prefix_space", None)
    prefix_space = _prefix_space(folder / _TOKENIZER)
    return values if prefix_space is None else {**values, "add_prefix_space": prefix_space}


def _is_of_version_5(values: dict[str, Any]) -> bool:
    return (
        values.get("tokenizer_class") == "TokenizersBackend"
        or values.get("backend") == "tokenizers"
        or isinstance(values.get("extra_special_tokens"), list)
    )


def _prefix_space(tokenizer: Path) -> bool | None:
    """Return whether a ``tokenizer.json`` puts a space before the text, where it says so in one place."""
    content = read_json(tokenizer)
    splitting = content.get("pre_tokenizer") if isinstance(content, dict) else None
    return splitting.get("add_prefix_space") if isinstance(splitting, dict) else None
