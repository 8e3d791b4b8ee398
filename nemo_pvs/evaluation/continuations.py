"""A multiple-choice task from any text: which of four continuations follows? Like HellaSwag, without human writers.

It has lm-eval's format and needs no download, so a run can build it from its held-out text. Chance is 25 %. It
separates small models trained on little data better than the public tasks do, but its results on different texts
cannot be compared.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import whole_folder, write_text

NAME = "continuation"
CHOICES = 4
CONTEXT_TOKENS = 32
ENDING_TOKENS = 16
_BROKEN = "\ufffd"
"""Replacement character, to which a tokenizer decodes part of a character."""


def write_continuations(
    text: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, questions: int, *, seed: int = 0
) -> None:
    """Write the task ``continuation`` as a folder for ``pvs evaluate --tasks``.

    A question is a window within one document: 32 tokens of context, the 16 tokens that follow as the right ending,
    and three endings from other windows. Windows are spread evenly over the text and do not overlap.

    Args:
        text: Prefix of a Megatron token file.
        tokenizer: The tokenizer of the token file.
        folder: Folder to write; an existing one is replaced.
        questions: Number of questions.
        seed: Seed for the choice of wrong endings and the position of the right one.

    Raises:
        UserError: the text is too short for this number of questions.
    """
    pairs = list(_pairs(text, tokenizer))
    _check_enough(text, len(pairs), questions)
    chosen = [pairs[number * len(pairs) // questions] for number in range(questions)]
    generator = random.Random(seed)
    documents = []
    for context, ending in chosen:
        others = sorted({other for _, other in pairs} - {ending})
        choices = generator.sample(others, CHOICES - 1)
        answer = generator.randrange(CHOICES)
        choices.insert(answer, ending)
        documents.append({"context": context, "choices": choices, "answer": answer})
    definition = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{NAME}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    with whole_folder(folder, overwrite=True) as partial:
        write_text(partial / f"{NAME}.yaml", yaml.safe_dump(definition, sort_keys=False))
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        write_text(partial / f"{NAME}.jsonl", lines)


def check_continuations(text: Path, tokenizer: PreTrainedTokenizerBase, questions: int) -> None:
    """Check that a text is long enough for a number of questions, as ``write_continuations`` does.

    Raises:
        UserError: the text is too short; the message says for how many questions it has enough text.
    """
    enough = itertools.islice(_pairs(text, tokenizer), max(questions, CHOICES))
    _check_enough(text, sum(1 for _ in enough), questions)


def _check_enough(text: Path, available: int, questions: int) -> None:
    if available < max(questions, CHOICES):
        raise UserError(
            f"{text} has text for {available} questions of the task {NAME}, not for {max(questions, CHOICES)}; lower "
            "task_limit, or hold out more text."
        )


def _pairs(text: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield (context, ending) of every window that can be a question."""
    windows = TokenSet.from_token_file(text, sequence_length=CONTEXT_TOKENS + ENDING_TOKENS).ids.tolist()
    for window in windows:
        if tokenizer.eos_token_id not in window:
            pair = _split(tokenizer, window)
            if pair is not None:
                yield pair


def _split(tokenizer: PreTrainedTokenizerBase, window: list[int]) -> tuple[str, str] | None:
    """Return (context, ending) as text, or None if a cut splits a character or the ending is blank."""
    text, context = tokenizer.decode(window), tokenizer.decode(window[:CONTEXT_TOKENS])
    ending = text[len(context) :]
    if _BROKEN in text or not text.startswith(context) or not ending.strip():
        return None
    return context, ending
