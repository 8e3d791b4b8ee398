"""Expresses a Hugging Face tokenizer in the keys of a GGUF file, or refuses what llama.cpp would do differently."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from nemo_pvs.checkpoints.gguf.tokenizer import PRE_TOKENIZERS, TokenType
from nemo_pvs.data.assets import MORE_TEMPLATES
from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

_GPT2 = "GPT-2's expression"
_DIGITS = "single digits"
_BLANK = "\u2581"  # SentencePiece's symbol for a space
# The steps of Llama 2's normalizer.
_PREPEND = {"type": "Prepend", "prepend": _BLANK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
_END_BY_DEFAULT = {"gpt2": 11, "llama": 2}
"""What llama.cpp takes for the end of a text if a file of this kind of tokenizer names no token (llama-vocab.cpp)."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, assets: Sequence[Path], config: Mapping[str, Any], rows: int) -> list[str]:
    """Add the keys of a tokenizer and of what a chat needs: special tokens, chat template.

    Args:
        writer: The file.
        assets: The model's files other than its weights.
        config: The model's config.json.
        rows: Rows of the embedding; those without a token are marked as unused.

    Returns:
        Sentences about texts that llama.cpp splits differently, if there are any.

    Raises:
        UserError: there is no ``tokenizer.json``, or llama.cpp has no equivalent.
    """
    files = {asset.name: asset for asset in assets}
    if "tokenizer.json" not in files:
        raise UserError(
            "The model has no tokenizer.json, without which llama.cpp reads no text; load its tokenizer with "
            "transformers' AutoTokenizer and save it next to the model."
        )
    where = files["tokenizer.json"]
    described = read_json(where)
    model, added = described["model"], {token["id"]: token for token in described.get("added_tokens", ())}
    if model.get("type") != "BPE":
        raise UserError(
            f"The tokenizer in {where} is of the kind {model.get('type')}; llama.cpp can express BPE, byte-level or "
            "as in SentencePiece."
        )
    for token in added.values():
        altered = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
        if altered:
            raise UserError(
                f"The token {token['content']!r} of {where} has {altered[0]}, which llama.cpp does not know; set it "
                "to false there if your texts do not depend on it."
            )
        if token.get("normalized") and _REPLACE in _steps_of(described.get("normalizer")):
            raise UserError(
                f"The token {token['content']!r} of {where} is looked for after spaces have been replaced "
                "(normalized), but llama.cpp looks for it before; set normalized to false there if your texts do not "
                "depend on it."
            )
    names = {index: token for token, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    if max(names) >= rows:
        raise UserError(f"{where} has a token {max(names)}, but the embedding has {rows:,} rows; use one that fits.")
    types = _types(names, added, model, rows)
    if _is_byte_level(described):
        notes = _add_byte_level(writer, where, described)
    else:
        notes = _add_sentencepiece(writer, where, described, names, added, rows)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([int(type_) for type_ in types])
    ids = {name: index for index, name in names.items()}
    special = {key: _special_token(key, files, config, ids, rows) for key in ("bos", "eos", "pad")}
    notes += _add_special_tokens(writer, where, described, special)
    _add_chat_templates(writer, assets)
    return notes


def _types(
    names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any], rows: int
) -> list[TokenType]:
    types = []
    for index in range(rows):
        if index not in names:
            types.append(TokenType.UNUSED)
        elif index in added:
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        elif model.get("byte_fallback") and _BYTE.fullmatch(names[index]):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    unknown = model["vocab"].get(model.get("unk_token"))
    if model.get("byte_fallback") and unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return types


def _add_byte_level(writer: GGUFWriter, where: Path, described: Mapping[str, Any]) -> list[str]:
    """Add a vocabulary of bytes and its merges.

    Returns:
        Sentences about texts that llama.cpp splits differently, if there are any.

    Raises:
        UserError: llama.cpp does not know how this tokenizer splits text.
    """
    model, pre = described["model"], _pre_tokenizer(where, described)
    unusual = [kind for kind in _kinds(described.get("normalizer")) if kind != "NFC"]
    if unusual:
        raise UserError(
            f"The tokenizer in {where} changes text before it splits it ({unusual[0]}), which llama.cpp does not do."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise UserError(
            f"The tokenizer in {where} has no merges, without which llama.cpp loads no byte-level tokenizer."
        )
    writer.add_token_merges(merges)
    notes = []
    if "NFC" in _kinds(described.get("normalizer")):
        notes.append(
            "Unlike the tokenizer, llama.cpp does not normalise text to Unicode form NFC; texts in another form are "
            "split differently."
        )
    if pre == "tekken":  # lookaheads and [^a-z] in llama-vocab.cpp
        notes.append(
            "In llama.cpp's expression for tekken, combining marks are not part of a word and only ASCII letters have "
            "case; texts in Thai, Hindi and the like, and words such as iÉcole, are split differently."
        )
    return notes


def _pre_tokenizer(where: Path, described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before any merge, found by comparing the expressions.

    llama.cpp's own converter compares the ids of a sample text, which a pruned vocabulary changes.

    Raises:
        UserError: llama.cpp has no name for it.
    """
    steps, whole = list(_steps(described.get("pre_tokenizer"))), bool(described["model"].get("ignore_merges"))
    for name, split in PRE_TOKENIZERS.items():
        known = [_DIGITS] * split.digits + [_GPT2 if split.pattern is None else split.pattern]
        if steps == known and whole == split.ignore_merges:
            return name
    shown = ", ".join(steps)[:200] or "not at all"
    raise UserError(
        f"The tokenizer in {where} splits text in a way that llama.cpp has no known name for ({shown}); the "
        f"known names are {', '.join(PRE_TOKENIZERS)}."
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield how a pre-tokenizer splits text, step by step, as the table of known ones describes it."""
    kind = pre_tokenizer["type"] if pre_tokenizer else None
    if pre_tokenizer is None:
        return
    if kind == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    elif kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        if pre_tokenizer.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits" and pre_tokenizer["individual_digits"]:
        yield _DIGITS
    elif kind == "Split" and "Regex" in pre_tokenizer["pattern"] and _isolates(pre_tokenizer):
        yield pre_tokenizer["pattern"]["Regex"]
    else:
        yield json.dumps(pre_tokenizer)


def _isolates(split: Mapping[str, Any]) -> bool:
    """Return whether a split makes each match of its expression a piece."""
    return (split["behavior"], split["invert"]) in {("Isolated", False), ("Removed", True)}


def _add_sentencepiece(
    writer: GGUFWriter,
    where: Path,
    described: Mapping[str, Any],
    names: Mapping[int, str],
    added: Mapping[int, Any],
    rows: int,
) -> list[str]:
    """Add a vocabulary whose merges are made by score, the highest first: minus the rank of a token's first merge.

    Returns:
        Sentences about texts that llama.cpp splits differently, if there are any.

    Raises:
        UserError: llama.cpp does not treat spaces as this tokenizer does.
    """
    model = described["model"]
    prefix, notes = _blank_in_front(where, described)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(model["merges"])
    scores = []
    for index in range(rows):
        scores.append(0.0 if index in added else -float(ranks.get(names.get(index, ""), last)))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(prefix)
    return notes


def _blank_in_front(where: Path, described: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Return whether a space is put in front of a text, and notes on the texts in which llama.cpp differs.

    llama.cpp does as SentencePiece and the normalizer of Llama 2 do: a space goes in front of a text, and of what
    follows a special token in it, even where there is one already. Transformers 5 saves a pre-tokenizer, Metaspace,
    in its place.

    Raises:
        UserError: spaces are treated in yet another way.
    """
    normalizer, pre_tokenizer = _steps_of(described.get("normalizer")), described.get("pre_tokenizer")
    if pre_tokenizer is None and normalizer in ([_PREPEND, _REPLACE], [_REPLACE]):
        return _PREPEND in normalizer, []
    metaspace = {"type": "Metaspace", "replacement": _BLANK, "split": False}
    if not normalizer and pre_tokenizer == {**metaspace, "prepend_scheme": "never"}:
        return False, []
    for scheme, also in (("always", ""), ("first", ", or has special tokens with text after them")):
        if not normalizer and pre_tokenizer == {**metaspace, "prepend_scheme": scheme}:
            return True, [
                f"A text that begins with a space{also} is split differently by llama.cpp, which puts another space "
                "there, as SentencePiece does and Transformers 5 does not."
            ]
    raise UserError(
        f"The tokenizer in {where} is not byte-level and does not treat spaces as Llama 2's does, so llama.cpp cannot "
        f"express it: its normalizer is {_shown(described.get('normalizer'))}, its pre-tokenizer "
        f"{_shown(pre_tokenizer)}."
    )


def _shown(step: Mapping[str, Any] | None) -> str:
    return json.dumps(step)[:200] if step else "none"


def _add_special_tokens(
    writer: GGUFWriter, where: Path, described: Mapping[str, Any], stated: Mapping[str, int | None]
) -> list[str]:
    """Add the ids of the special tokens and which of them every text begins and ends with.

    Returns:
        A sentence if nothing says which token ends a text.
    """
    ids = dict(stated)
    front, back = _ends(where, described.get("post_processor"))
    if front is not None:  # what the tokenizer puts in front, whatever the config calls bos
        ids["bos"] = front
    if back is not None and back != ids["eos"]:
        raise UserError(
            f"The tokenizer in {where} ends texts with the token {back}, but llama.cpp ends them with the model's "
            f"eos_token_id, {ids['eos']}; make its post_processor add that token, or none."
        )
    writer.add_add_bos_token(front is not None)
    writer.add_add_eos_token(back is not None)
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for key, add in adders.items():
        index = ids[key]
        if index is not None:
            add(index)
    unknown = described["model"]["vocab"].get(described["model"].get("unk_token"))
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    if ids["eos"] is not None:
        return []
    default = _END_BY_DEFAULT["gpt2" if _is_byte_level(described) else "llama"]
    return [
        f"Nothing says which token ends a text (eos_token_id), so llama.cpp takes its default, the token {default}; "
        "name the right one in generation_config.json and convert again."
    ]


def _special_token(
    key: str, files: Mapping[str, Path], config: Mapping[str, Any], ids: Mapping[str, int], rows: int
) -> int | None:
    """Return the id of a special token: the generation config's, the config's, or that of the tokenizer's own token.

    What is no row of the embedding counts as none: old configs have -1, and llama.cpp would take its default instead.
    """
    stated = [values.get(f"{key}_token_id") for values in (_settings(files, "generation_config.json"), config)]
    for file in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        token = _settings(files, file).get(f"{key}_token")
        stated.append(ids.get(str(token["content"] if isinstance(token, dict) else token)))
    for one in stated:
        for index in one if isinstance(one, list) else [one]:
            if isinstance(index, int) and 0 <= index < rows:
                return index
    return None


def _settings(files: Mapping[str, Path], name: str) -> Mapping[str, Any]:
    """Return one of the model's JSON files; an empty dictionary without it."""
    values = read_json(files[name]) if name in files else {}
    return values if isinstance(values, dict) else {}


def _ends(where: Path, post_processor: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """Return the ids of the tokens that a text is put between.

    Raises:
        UserError: there is more than one on a side, or they are not described by a template.
    """
    front: list[int] = []
    back: list[int] = []
    for step in _steps_of(post_processor):
        if step["type"] == "TemplateProcessing":
            before: list[int] = []
            after: list[int] = []
            side = before
            for part in step["single"]:
                if "Sequence" in part:
                    side = after
                else:
                    side += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            front, back = before + front, back + after
        elif step["type"] != "ByteLevel":  # which only moves offsets
            raise UserError(
                f"The tokenizer in {where} adds tokens around texts by {step['type']}, which is not supported for "
                "GGUF; express the same as TemplateProcessing there."
            )
    if len(front) > 1 or len(back) > 1:
        raise UserError(
            f"The tokenizer in {where} begins texts with {len(front)} tokens and ends them with {len(back)}, but "
            "llama.cpp adds at most one on each side; change its post_processor."
        )
    return front[0] if front else None, back[0] if back else None


def _add_chat_templates(writer: GGUFWriter, assets: Sequence[Path]) -> None:
    """Add the chat template, and others under their names if there are several."""
    templates: dict[str, str] = {}
    for asset in assets:
        if asset.name == TOKENIZER_CONFIG:
            stated = read_json(asset).get("chat_template") or {}
            if isinstance(stated, str):
                stated = {"default": stated}
            elif isinstance(stated, list):
                stated = {entry["name"]: entry["template"] for entry in stated}
            templates = {**stated, **templates}  # the separate files take precedence
        elif asset.parent.name == MORE_TEMPLATES:
            templates[asset.stem] = asset.read_text(encoding="utf-8")
        elif asset.name == "chat_template.jinja":
            templates["default"] = asset.read_text(encoding="utf-8")
    if templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    return "ByteLevel" in [*_kinds(described.get("pre_tokenizer")), *_kinds(described.get("decoder"))]


def _kinds(step: Mapping[str, Any] | None) -> list[str]:
    return [inner["type"] for inner in _steps_of(step)]


def _steps_of(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer, post-processor or decoder, without sequences around them."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    inner = next(value for key, value in step.items() if key != "type")
    return [inner_step for part in inner for inner_step in _steps_of(part)]
