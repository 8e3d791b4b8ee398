"""Converts Transformers 5's ``tokenizer_config.json`` so that version 4, and therefore NeMo, also loads it.

Version 5 stores everything that determines ids in ``tokenizer.json`` and names classes that version 4 lacks
(``TokenizersBackend``) or implements differently (``LlamaTokenizer``). Version 4's ``PreTrainedTokenizerFast`` uses
``tokenizer.json`` as it is, and version 5 also has that class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pvs.system.files import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"

# Keys in which version 5 records how the tokenizer was loaded.
_NOTES = ("backend", "is_local", "local_files_only")


def for_both_versions(folder: Path) -> dict[str, Any] | None:
    """Return the ``tokenizer_config.json`` of a folder in a form that both Transformers 4 and 5 read.

    Returns:
        None if nothing needs to change: there is no such file, or version 5 did not write it.

    Raises:
        UserError: it is not valid JSON.
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
    # Version 4 sets this on the tokenizer, to False if it is missing.
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
    """Return the ``add_prefix_space`` of a ``tokenizer.json``'s pre-tokenizer; None if it does not state one."""
    content = read_json(tokenizer)
    splitting = content.get("pre_tokenizer") if isinstance(content, dict) else None
    return splitting.get("add_prefix_space") if isinstance(splitting, dict) else None
