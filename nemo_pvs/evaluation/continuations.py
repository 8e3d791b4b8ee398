"""A task out of any text: which of four continuations follows? In the form of lm-eval, like HellaSwag without people.

It needs no download, so a run can ask it of the text that it held out. Chance is 25 %. It says more of small models on
little data than the public tasks do, and nothing that can be compared with anybody else's text.
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
"""What a window that begins or ends within a character decodes to."""


def write_continuations(
    text: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, questions: int, *, seed: int = 0
) -> None:
    """Write the task ``continuation`` as a folder for ``pvs evaluate --tasks``.

    A question is a window of the text that crosses no end of a document: 32 tokens, the 16 that follow them, and
    three times 16 that follow elsewhere. Windows are spread evenly over the text and do not overlap.

    Args:
        text: Prefix of a Megatron token file.
        tokenizer: What the text was tokenised with.
        folder: Where to; it is replaced.
        questions: How many.
        seed: Draws the wrong endings and the place of the right one.

    Raises:
        UserError: the text is too short for so many.
    """
    pairs = list(_pairs(text, tokenizer))
    _check_enough(text, len(pairs), questions)
    chosen = [pairs[number * len(pairs) // questions] for number in range(questions)]
    draw = random.Random(seed)
    documents = []
    for context, ending in chosen:
        others = sorted({other for _, other in pairs} - {ending})
        choices = draw.sample(others, CHOICES - 1)
        answer = draw.randrange(CHOICES)
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
    """Refuse a text that is too short for so many questions, as ``write_continuations`` would.

    Raises:
        UserError: saying for how many it is long enough.
    """
    enough = itertools.islice(_pairs(text, tokenizer), max(questions, CHOICES))
    _check_enough(text, sum(1 for _ in enough), questions)


def _check_enough(text: Path, found: int, questions: int) -> None:
    if found < max(questions, CHOICES):
        raise UserError(
            f"{text} has text for {found} questions of the task {NAME}, not for {max(questions, CHOICES)}; lower "
            "task_limit, or hold out more text."
        )


def _pairs(text: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield context and ending of every window that makes a question."""
    windows = TokenSet.from_token_file(text, sequence_length=CONTEXT_TOKENS + ENDING_TOKENS).ids.tolist()
    for window in windows:
        if tokenizer.eos_token_id not in window:
            pair = _split(tokenizer, window)
            if pair is not None:
                yield pair


def _split(tokenizer: PreTrainedTokenizerBase, window: list[int]) -> tuple[str, str] | None:
    """Return context and ending as text, or None where the cut falls into a character."""
    text, context = tokenizer.decode(window), tokenizer.decode(window[:CONTEXT_TOKENS])
    ending = text[len(context) :]
    if _BROKEN in text or not text.startswith(context) or not ending.strip():
        return None
    return context, ending
