"""Expresses a Hugging Face tokenizer in the keys of a GGUF file, or refuses what llama.cpp would do differently."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from nemo_pvs.checkpoints.gguf.tokenizer import PRE_TOKENIZERS, TokenType
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

_GPT2 = "GPT-2's expression"
_DIGITS = "single digits"
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
            "The model has no tokenizer.json, without which llama.cpp reads no text; load its tokenizer by "
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
    names = {index: token for token, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    if max(names) >= rows:
        raise UserError(f"{where} has a token {max(names)}, but the embedding has {rows:,} rows; use one that fits.")
    types = _types(names, added, model, rows)
    if _is_byte_level(described):
        _add_byte_level(writer, where, described)
    else:
        _add_sentencepiece(writer, where, described, names, added, rows)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([int(type_) for type_ in types])
    _add_special_tokens(writer, described, files, config, names)
    _add_chat_template(writer, files)
    if "NFC" in _kinds(described.get("normalizer")):
        return [
            "llama.cpp does not bring text into Unicode's form NFC first, as the tokenizer does; texts in another "
            "form are split differently."
        ]
    return []


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


def _add_byte_level(writer: GGUFWriter, where: Path, described: Mapping[str, Any]) -> None:
    model = described["model"]
    unusual = [kind for kind in _kinds(described.get("normalizer")) if kind != "NFC"]
    if unusual:
        raise UserError(f"The tokenizer in {where} changes text first ({unusual[0]}), which llama.cpp does not do.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(where, described))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise UserError(
            f"The tokenizer in {where} has no merges, and llama.cpp loads no byte-level tokenizer without."
        )
    writer.add_token_merges(merges)


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
        f"The tokenizer in {where} splits text in a way for which llama.cpp has no name known here ({shown}); the "
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
) -> None:
    """Add a vocabulary whose merges are made by score, the highest first: minus the rank of a token's first merge."""
    model, kinds = described["model"], _kinds(described.get("normalizer"))
    if described.get("pre_tokenizer") is not None or not {*kinds} <= {"Prepend", "Replace"}:
        raise UserError(
            f"The tokenizer in {where} is neither byte-level nor as Llama 2's (a normalizer that replaces blanks, no "
            "pre-tokenizer); llama.cpp cannot express it."
        )
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
    writer.add_add_space_prefix("Prepend" in kinds)


def _add_special_tokens(
    writer: GGUFWriter,
    described: Mapping[str, Any],
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    names: Mapping[int, str],
) -> None:
    """Add the ids of the special tokens and which of them every text begins and ends with."""
    ids = {key: config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    if "generation_config.json" in files:
        generation = read_json(files["generation_config.json"])
        found = {key: generation.get(f"{key}_token_id") for key in ids}
        ids.update({key: index for key, index in found.items() if index is not None})
    by_name = {name: index for index, name in names.items()}
    ends = _ends(described.get("post_processor"))
    front = ends[0].get("SpecialToken", {}).get("id") if ends else None
    back = ends[-1].get("SpecialToken", {}).get("id") if ends else None
    if front is not None:  # what the tokenizer puts in front, whatever the config calls bos
        ids["bos"] = by_name[front]
    writer.add_add_bos_token(front is not None)
    writer.add_add_eos_token(back is not None)
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for key, add in adders.items():
        stated = ids[key]
        first = stated[0] if isinstance(stated, list) else stated
        if first is not None:
            add(int(first))
    unknown = described["model"]["vocab"].get(described["model"].get("unk_token"))
    if unknown is not None:
        writer.add_unk_token_id(unknown)


def _ends(post_processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return what a text is put between: special tokens and a sequence."""
    if post_processor is None:
        return []
    for step in [post_processor, *post_processor.get("processors", ())]:
        if step["type"] == "TemplateProcessing":
            return list(step["single"])
    return []


def _add_chat_template(writer: GGUFWriter, files: Mapping[str, Path]) -> None:
    if "chat_template.jinja" in files:
        writer.add_chat_template(files["chat_template.jinja"].read_text())
    elif "tokenizer_config.json" in files:
        template = read_json(files["tokenizer_config.json"]).get("chat_template")
        if template:
            writer.add_chat_template(template)


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    return "ByteLevel" in [*_kinds(described.get("pre_tokenizer")), *_kinds(described.get("decoder"))]


def _kinds(step: Mapping[str, Any] | None) -> list[str]:
    """Return the kinds of the steps of a normalizer, pre-tokenizer or decoder, without the sequences around them."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step["type"]]
    inner = next(value for key, value in step.items() if key != "type")
    return [kind for part in inner for kind in _kinds(part)]
