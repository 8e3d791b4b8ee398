"""Generated text is that of Transformers' own greedy decoding, token by token, and that of lm-eval's own HFLM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import nemo_pvs.modeling  # noqa: F401 - AutoModelForCausalLM loads our uneven models
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.checkpoint import OpenedCheckpoint
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.evaluation.store import Journal
from tests.conftest import save_tiny_tokenizer
from tests.families import CASES, save_tiny
from tests.uneven_model import BIASES, make_uneven

NEW = 16
LENGTHS = (1, 17, 17, 18, 41, 3)


def prompts(seed: int = 0, vocab: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(folder: Path, **settings: Any) -> CheckpointLM:
    scorer = TransformersScorer(HuggingFaceSource(folder), dtype=torch.float32, device="cpu")
    return CheckpointLM(scorer, AutoTokenizer.from_pretrained(folder), 256, **settings)


def by_transformers(
    folder: Path, asked: list[list[int]], new: int = NEW, ends: Sequence[int] = (0,)
) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "eos_token_id": [*ends], "pad_token_id": 0}

    def generate(ids: list[int]) -> list[int]:
        prompt = torch.tensor([ids])
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(ids) :].tolist()

    return [generate(ids) for ids in asked]


def words(lengths: int) -> list[str]:
    """Return all words over the letters a to d up to a length."""
    return ["".join(word) for size in range(1, lengths + 1) for word in itertools.product("abcd", repeat=size)]


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """A random model whose tokens are one, two or three letters, so that strings begin and end inside tokens."""
    folder = save_tiny(tmp_path_factory.mktemp("letters"), "llama")
    merges = [(word[:-1], word[-1]) for word in words(3) if len(word) > 1]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words(3))}, merges))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    extra = [f"<{index}>" for index in range(len(words(3)) + 1, 128)]  # the model has 128 tokens
    tokenizer.add_tokens(extra)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


CONTEXTS = ["abcd", "ba" * 9, "c", "dd" * 12 + "abca", "bcd" * 5, "abcd"]


def requests(*until: str, new: int = NEW, contexts: list[str] = CONTEXTS) -> list[Any]:
    return [
        SimpleNamespace(args=(context, {"until": list(until), "max_gen_toks": new, "do_sample": False}))
        for context in contexts
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "about", "settings"), [*CASES, ("uneven", "", {})])
def test_greedy_is_that_of_transformers_for_every_family(family, about, settings, tmp_path):
    if family == "uneven":
        folder = save_tiny_tokenizer(make_uneven(tmp_path, **BIASES))
    else:
        folder = save_tiny(tmp_path, family, **settings)
    new = 40 if about == "window" else NEW  # past the window of 64 tokens
    expected = by_transformers(folder, prompts(), new)
    assert len({tuple(answer) for answer in expected}) > len(expected) // 2
    for size in (None, 3):
        assert ours(folder, batch_size=size).greedy(prompts(), new) == expected


def test_a_text_ends_before_its_first_stop_string_wherever_tokens_end(letters):
    """Every part of the longest text of up to seven letters is a stop string: in a token, at its ends, of several."""
    model = ours(letters)
    texts = model.generate_until(requests())
    longest = max(texts, key=len)
    assert len(longest) > 2 * NEW
    for begin, size in ((0, 1), (1, 3), (7, 2), (8, 4), (10, 7), (17, 5), (len(longest) - 2, 2)):
        stop = longest[begin : begin + size]
        assert model.generate_until(requests(stop)) == [text.split(stop)[0] for text in texts], stop
    stops = longest[20:25], longest[9:16]
    both = [min((text.split(stop)[0] for stop in stops), key=len) for text in texts]
    assert model.generate_until(requests(*stops)) == both
    assert model.generate_until(requests("no such text", "")) == texts


def test_generation_ends_with_its_stop_string(letters):
    """Nothing is generated that would be cut off again."""
    model = ours(letters)
    [whole] = model.greedy([[3, 1]], NEW)
    text = model.tokenizer.decode(whole)
    for length in range(1, NEW + 1):
        stop = model.tokenizer.decode(whole[:length])[-4:]
        [answer] = model.greedy([[3, 1]], NEW, until=[stop])
        reached = next(end for end in range(1, NEW + 1) if stop in model.tokenizer.decode(whole[:end]))
        assert answer == whole[:reached], (text, stop)


@pytest.mark.slow
def test_texts_are_those_of_lm_evals_own_model(letters):
    hf = AutoModelForCausalLM.from_pretrained(letters, dtype=torch.float32).eval()
    theirs = HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(letters), max_length=40, batch_size=1)
    scorer = TransformersScorer(HuggingFaceSource(letters), dtype=torch.float32, device="cpu")
    model = CheckpointLM(scorer, AutoTokenizer.from_pretrained(letters), 40)
    contexts = [*CONTEXTS, "abcdd" * 30]  # which is truncated
    for until in ((), ("ab",), ("cb", "dab", "<eos>"), ("<100>",)):
        asked = requests(*until, contexts=contexts)
        assert model.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_batches_do_not_matter(letters):
    expected = ours(letters, batch_size=1).generate_until(requests("ab"))
    for size in (2, 3, 5, None):
        assert ours(letters, batch_size=size).generate_until(requests("ab")) == expected
    mixed = [*requests("ab"), *requests("c", new=3)]
    assert ours(letters).generate_until(mixed) == [*expected, *ours(letters).generate_until(requests("c", new=3))]


def test_sequences_leave_a_batch_at_different_times(letters):
    asked = torch.randint(0, 80, (16, 4), generator=torch.Generator().manual_seed(1)).tolist()
    expected = by_transformers(letters, asked, ends=range(16))
    assert len({len(answer) for answer in expected}) > 5
    assert ours(letters, ends=range(16)).greedy(asked, NEW) == expected


def test_a_text_ends_with_each_end_of_text_token(letters):
    [whole] = ours(letters).greedy([[3, 1]], NEW)
    end = whole[NEW // 2]
    until_end = whole[: whole.index(end) + 1]
    assert ours(letters, ends=[end]).greedy([[3, 1]], NEW) == [until_end]
    assert ours(letters, ends=[5000, end]).greedy([[3, 1], [4]], NEW)[0] == until_end
    assert ours(letters, ends=[end]).greedy([[3, 1]], NEW, ends=()) == [whole]
    assert ours(letters).greedy([[3, 1]], 0) == [[]]


def test_end_of_text_tokens_are_those_of_the_generation_config(letters, tmp_path):
    tokenizer_end = ours(letters).eot_token_id
    folder = save_tiny(tmp_path, "llama", eos_token_id=7)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((letters / name).read_bytes())
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert OpenedCheckpoint(str(folder)).ends == {7, tokenizer_end}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert OpenedCheckpoint(str(folder)).ends == {3, 4, tokenizer_end}


def test_a_killed_task_goes_on_where_it_was(letters, tmp_path):
    class KilledError(Exception):
        pass

    model = ours(letters, batch_size=2, journal=Journal(tmp_path / "journal"))
    decoder, made = model._scorer.decoder, []

    def dying(rows: int, length: int) -> Any:
        if len(made) == 2:
            raise KilledError
        made.append(rows)
        return decoder(rows, length)

    model._scorer.decoder = dying
    with pytest.raises(KilledError):
        model.generate_until(requests("ab"))
    again = ours(letters, batch_size=2, journal=Journal(tmp_path / "journal"))
    decoder_again, later, steps = again._scorer.decoder, [], []
    again._scorer.decoder = lambda rows, length: (later.append(rows), decoder_again(rows, length))[1]
    again.progress = lambda done, total, note: steps.append((done, total, note))
    answers = again.generate_until(requests("ab"))
    different = len(set(CONTEXTS))
    assert sum(made) + sum(later) == different
    assert steps[-1][:2] == (different, different)
    assert steps[-1][2].endswith(" tokens/s")
    assert answers == ours(letters).generate_until(requests("ab"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample: True, temperature: 0.7"),
        ({"temperature": 0.2}, "temperature: 0.2"),
        ({"num_beams": 4}, "num_beams: 4"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1"),
    ],
)
def test_what_is_not_greedy_is_refused_by_name(letters, settings, named):
    with pytest.raises(UserError, match=f"generates text with .*{named}, but pvs evaluate supports only greedy"):
        ours(letters).generate_until([SimpleNamespace(args=("ab", settings))])


def test_what_is_greedy_by_another_name_is_not_refused(letters):
    expected = ours(letters).generate_until(requests("ab", new=5))
    for settings in (
        {"until": "ab", "max_new_tokens": 5},
        {"until": ["ab"], "max_tokens": 5, "temperature": 0, "num_beams": 1},
        {"until": ["ab"], "max_gen_toks": 5, "do_sample": False, "temperature": 1, "top_p": 0.9},
    ):
        asked = [SimpleNamespace(args=(context, settings)) for context in CONTEXTS]
        assert ours(letters).generate_until(asked) == expected


def test_more_tokens_than_the_context_has_are_refused(letters):
    with pytest.raises(UserError, match="up to 256 new tokens, which do not fit the model's context of 256"):
        ours(letters).generate_until([SimpleNamespace(args=("ab", {}))])
