"""Requests answered by real Megatron ranks, from NeMo checkpoints, are those that lm-eval's own HFLM answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.store import Journal
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import Outcome
from tests.evaluation.models import TASKS, VOCAB, save_byte_model, save_byte_tokenizer
from tests.families import save_tiny
from tests.megatron.ranks import pvs_on_ranks, run_ranks
from tests.megatron.test_logits import LLAMA31
from tests.uneven_model import BIASES, make_uneven

pytestmark = pytest.mark.parallel

CONTEXT = 64
# World size, tensor parallel, pipeline parallel.
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2)]


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def _requests(countries: int = 8) -> tuple[list[Any], list[Any]]:
    """Return requests of a context and a continuation, and of whole texts; some are longer than the context."""
    capitals = _lines("capitals")[:countries]
    pairs = [(f"The capital of {line['country']} is", f" {one}") for line in capitals for one in line["choices"]]
    pairs += [(line["start"], line["end"]) for line in _lines("endings")]
    pairs += [(line["text"][:90], line["text"][90:]) for line in _lines("letters")[:1]]
    pairs += [("", "No context at all"), ("A trailing space ", "moves")]
    texts = [(line["text"],) for line in _lines("letters")]
    return [SimpleNamespace(args=pair) for pair in pairs], [SimpleNamespace(args=text) for text in texts]


def _ask(model: Any, *countries: int) -> tuple[list[tuple[float, bool]], list[float]]:
    pairs, texts = _requests(*countries)
    return model.loglikelihood(pairs), model.loglikelihood_rolling(texts)


def _ask_megatron(
    folders: list[Path], tensor_parallel: int, pipeline_parallel: int, journal: Path | None = None, *countries: int
) -> tuple[list[Any], list[int]]:
    """Return the answers for each checkpoint, and how many sequences this rank has scored."""
    from nemo_pvs.megatron.inference import MegatronScorer, megatron_ranks
    from nemo_pvs.system.ranks import joined

    answers, scored = [], []
    with joined(on_gpus=True), megatron_ranks(tensor_parallel, pipeline_parallel):
        for folder in folders:
            scorer = MegatronScorer(open_source(folder), dtype=torch.float32, device="cpu")
            score, count = scorer.score, [0]

            def counting(ids, score=score, count=count):
                count[0] += len(ids)
                return score(ids)

            scorer.score = counting
            tokenizer = AutoTokenizer.from_pretrained(folder / "context" / "tokenizer")
            model = CheckpointLM(scorer, tokenizer, CONTEXT, batch_size=5, journal=journal and Journal(journal))
            answers.append(_ask(model, *countries))
            scored.append(count[0])
    return answers, scored


def _ask_huggingface(folder: Path, *countries: int) -> tuple[list[tuple[float, bool]], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=3, device="cpu")
    return _ask(model, *countries)


def _assert_equal(ours: Any, theirs: Any, tolerance: float = 1e-3) -> None:
    for (pairs, texts), (expected_pairs, expected_texts) in zip(ours, theirs, strict=True):
        assert [one for one, _ in pairs] == pytest.approx([one for one, _ in expected_pairs], abs=tolerance, rel=0)
        assert [greedy for _, greedy in pairs] == [greedy for _, greedy in expected_pairs]
        assert texts == pytest.approx(expected_texts, abs=3 * tolerance, rel=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[list[Path], list[Any]]:
    """NeMo checkpoints of tiny models of several kinds, and what HFLM answers for the originals."""
    folder = tmp_path_factory.mktemp("models")
    made = [
        save_byte_model(folder / "llama"),  # 257 tokens, which two ranks do not divide
        save_byte_model(folder / "tied", std=0.1, **{**LLAMA31, "tie_word_embeddings": True}),
        save_byte_tokenizer(make_uneven(folder / "uneven", std=0.1, vocab_size=VOCAB + 1, **BIASES)),
        save_byte_tokenizer(save_tiny(folder / "qwen3", "qwen3", vocab_size=VOCAB + 1)),
    ]
    for path in made:
        write_nemo(HuggingFaceSource(path), folder / "nemo" / path.name, pad_vocab_to_multiple=4)
    return [folder / "nemo" / path.name for path in made], [_ask_huggingface(path) for path in made]


@pytest.mark.parametrize(("world", "tensor", "pipeline"), LAYOUTS, ids=lambda value: str(value))
def test_every_request_is_answered_as_by_hflm(models, world, tensor, pipeline):
    nemo, expected = models
    if pipeline == 2:
        nemo, expected = nemo[:3], expected[:3]  # qwen3 has three layers
    results = run_ranks(world, _ask_megatron, nemo, tensor, pipeline)
    for answers, _ in results:
        _assert_equal(answers, expected)
    pairs, texts = _requests()
    if (world, tensor, pipeline) == (2, 1, 1):
        assert all(0 < count < len(pairs) + 4 * len(texts) for _, scored in results for count in scored)
        assert results[0][1] != [0] * 4, "copies of the model share the work"


def test_a_killed_evaluation_goes_on_with_other_ranks(models, tmp_path):
    nemo, expected = models[0][:1], models[1][:1]
    [_, _] = run_ranks(2, _ask_megatron, nemo, 1, 1, tmp_path / "journal")
    files = sorted((tmp_path / "journal").glob("*.jsonl"))
    assert len(files) == 2
    # What a kill leaves: one rank's file gone, the other torn in its last line.
    files[1].unlink()
    files[0].write_bytes(files[0].read_bytes()[:-9])
    kept = files[0].read_bytes().count(b"\n")
    (answers, scored), *_ = run_ranks(2, _ask_megatron, nemo, 2, 1, tmp_path / "journal")
    _assert_equal(answers, expected)
    (_, all_scored), *_ = run_ranks(2, _ask_megatron, nemo, 2, 1)
    assert scored[0] == all_scored[0] - kept
    (answers, scored), *_ = run_ranks(2, _ask_megatron, nemo, 1, 2, tmp_path / "journal")
    _assert_equal(answers, expected)
    assert scored == [0]


def _refusal(folder: Path, tensor_parallel: int) -> str:
    with pytest.raises(UserError) as refused:
        _ask_megatron([folder], tensor_parallel, 1)
    return str(refused.value)


def test_a_layout_that_does_not_divide_the_model_is_refused(models):
    assert "Tensor parallelism 4 does not divide kv_groups=2" in run_ranks(4, _refusal, models[0][0], 4)[0]


def test_a_checkpoint_saved_in_the_middle_of_training(job: TrainingJob, tmp_path):
    """With the optimizer's state in it; read by Megatron, and as a Hugging Face folder by HFLM."""
    middle = last_checkpoint(job)
    assert any(name.startswith("optimizer") for name in open_source(middle).extra_tensors)
    convert(middle, tmp_path / "hf", to="hf")
    (answers, _), *_ = run_ranks(2, _ask_megatron, [middle], 2, 1)
    _assert_equal(answers, [_ask_huggingface(tmp_path / "hf")])


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A run that died at step 5 of 8, after its checkpoint of step 4."""
    from nemo_pvs.recipe.fields import Parallelism
    from nemo_pvs.recipe.training import Training
    from tests.megatron.ranks import write_tokens
    from tests.megatron.test_training import _train

    folder = tmp_path_factory.mktemp("job")
    write_nemo(HuggingFaceSource(save_byte_model(folder / "model", std=0.02)), folder / "initial")
    text = (" ".join(line["text"] for line in _lines("letters")) * 20).encode()
    (folder / "run").mkdir()
    job = TrainingJob(
        name="middle",
        folder=folder / "run",
        initial=folder / "initial",
        data={name: write_tokens(folder / name, list(text)) for name in ("train", "validation")},
        layout=Parallelism(),
        training=Training(
            tokens=8 * 4 * 32, sequence_length=32, global_batch_size=4, micro_batch_size=2, learning_rate=3e-3,
            precision="fp32", validations=1, validation_samples=8, checkpoints=2,
        ),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, _train, job, 6)
    return job


@pytest.mark.slow
def test_the_verb_on_ranks(pvs, tmp_path):
    """Tensor parallel on Megatron, and alone on transformers: the same table, one rank talking."""
    model = save_byte_model(tmp_path / "model")
    write_nemo(HuggingFaceSource(model), tmp_path / "nemo")
    options = ["--tasks", TASKS, "--perplexity", TASKS / "letters.jsonl", "--sequence-length", 32]

    def on_ranks(*arguments: object) -> Outcome:
        return pvs_on_ranks(2, *arguments)

    def evaluate(run: Callable[..., Outcome], out: str, *more: object) -> dict[str, Any]:
        done = run("evaluate", *options, *more, "--out", tmp_path / out)
        assert done.code == 0, done.errors[-3000:]
        assert done.output.count("Results:") == 1
        return json.loads((tmp_path / out / "results.json").read_text())["models"][0]

    ours = evaluate(on_ranks, "two", tmp_path / "nemo", "--tensor-parallel", 2)
    alone = evaluate(pvs, "one", model)
    assert (ours["backend"], alone["backend"]) == ("megatron", "transformers")
    assert ours["fingerprint"] == alone["fingerprint"]
    assert ours["measured"].keys() == alone["measured"].keys()
    for name, about in ours["measured"].items():
        expected = alone["measured"][name]
        assert about["value"] == pytest.approx(expected["value"], rel=1e-4), name
        assert about["documents"] == expected["documents"]
    assert not list((tmp_path / "two").rglob("*.journal"))
