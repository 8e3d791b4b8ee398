"""The teacher's k most likely tokens and the divergence from them, against their definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nemo_pvs.megatron.distillation.losses import vocabulary_parallel_kl
from nemo_pvs.megatron.distillation.top_k import top_k_answers, top_k_kl
from tests.megatron.ranks import run_ranks

VOCAB, COLUMNS = 47, 64
"""The other columns are padding, as where ranks do not divide the vocabulary; the last of 4 ranks has no others."""


def _logits(seed: int, scale: float = 10.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(7, 3, COLUMNS, generator=generator, dtype=torch.float64) + 100


def _weights() -> torch.Tensor:
    return torch.rand(7, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _reference(student: torch.Tensor, teacher: torch.Tensor, k: int, rest: bool, temperature: float) -> torch.Tensor:
    """The definition, by autograd through plain softmaxes."""
    p, log_q = (teacher[..., :VOCAB] / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    kept, ids = p.topk(k)
    log_q_kept = log_q.gather(-1, ids)
    if not rest:
        kept = kept / kept.sum(-1, keepdim=True)
        return temperature**2 * (kept * (kept.log() - log_q_kept)).sum(-1)
    others = p.scatter(-1, ids, 0.0).sum(-1)
    log_q_others = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return (kept * (kept.log() - log_q_kept)).sum(-1) + torch.xlogy(others, others) - others * log_q_others


CASES = [(5, False, 1.0), (5, False, 3.0), (47, False, 0.5), (5, True, 1.0), (1, True, 1.0), (46, True, 1.0)]


@pytest.mark.parametrize(("k", "rest", "temperature"), CASES)
def test_divergence_and_gradient_are_those_of_the_definition(k, rest, temperature):
    student, teacher, weights = _logits(0).requires_grad_(), _logits(1), _weights()
    ids, logprobs, others = top_k_answers(teacher, k, vocab=VOCAB)
    kl = top_k_kl(student, ids, logprobs, others if rest else None, temperature=temperature)
    (weights * kl).sum().backward()
    whole = student.detach().clone().requires_grad_()
    reference = _reference(whole, teacher, k, rest, temperature)
    (weights * reference).sum().backward()
    torch.testing.assert_close(kl, reference, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(student.grad, whole.grad, rtol=1e-9, atol=1e-13)


def test_answers_are_a_distribution_with_the_rest():
    teacher = _logits(1)
    for k in (1, 5, 46, 47):
        ids, logprobs, rest = top_k_answers(teacher, k, vocab=VOCAB)
        wanted = teacher[..., :VOCAB].log_softmax(-1)
        torch.testing.assert_close(logprobs, wanted.topk(k).values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(wanted.gather(-1, ids), logprobs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logprobs.exp().sum(-1) + rest.exp(), torch.ones(7, 3, dtype=torch.float64))
    assert torch.equal(rest, torch.full((7, 3), -torch.inf, dtype=torch.float64))


def test_a_tiny_rest_is_not_lost_to_rounding():
    """The rest is 1e-12, far below the resolution of fp32 around 1."""
    teacher = torch.full((1, COLUMNS), -40.0)
    teacher[0, 7] = 0.0
    _, _, rest = top_k_answers(teacher, 1, vocab=VOCAB)
    assert float(rest) == pytest.approx(np.log((VOCAB - 1) * np.exp(-40)), rel=1e-6)


def test_the_online_loss_is_that_of_the_answers_in_single_precision():
    """Loss and gradient to 1e-6, also from answers whose dtype is that of a cache in fp32."""
    teacher, weights = _logits(1, 3.0)[..., :VOCAB].float(), _weights().float()
    for temperature in (1.0, 2.0):
        online, cached = (_logits(0, 3.0)[..., :VOCAB].float().requires_grad_() for _ in range(2))
        answers = top_k_answers(teacher, 8, vocab=VOCAB)
        wanted = vocabulary_parallel_kl(online, teacher, temperature=temperature, top_k=8)
        found = top_k_kl(cached, answers[0].int(), answers[1], temperature=temperature)
        for kl in (wanted, found):
            (weights * kl).sum().backward()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cached.grad, online.grad, rtol=0, atol=1e-6)


def test_a_student_that_is_sure_of_the_kept_tokens_has_a_finite_gradient():
    student = torch.zeros(1, COLUMNS)
    student[0, 0] = 300.0
    student.requires_grad_()
    ids, logprobs, rest = top_k_answers(torch.zeros(1, COLUMNS), 1, vocab=COLUMNS)
    for kl in (top_k_kl(student, ids * 0, logprobs, rest), top_k_kl(student, ids * 0 + 1, logprobs)):
        kl.sum().backward()
        assert torch.isfinite(kl).all()
        assert torch.isfinite(student.grad).all()


def test_answers_of_other_tokens_are_refused():
    ids, logprobs, rest = top_k_answers(_logits(1), 5, vocab=VOCAB)
    with pytest.raises(ValueError, match="not for the same tokens"):
        top_k_kl(_logits(0)[:6], ids, logprobs)
    with pytest.raises(ValueError, match="at temperature 1, not 2"):
        top_k_kl(_logits(0), ids, logprobs, rest, temperature=2.0)


def _of_shards(arrays: list[np.ndarray], k: int, rest: bool, temperature: float) -> tuple[Any, ...]:
    """Return the answers, the divergence and the gradient of its weighted sum from this rank's columns."""
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    student, teacher, weights = map(torch.from_numpy, arrays)
    mine = student.chunk(ranks, -1)[rank].clone().requires_grad_()
    group = distributed.group.WORLD
    answers = top_k_answers(teacher.chunk(ranks, -1)[rank], k, vocab=VOCAB, group=group)
    kl = top_k_kl(mine, *answers[:2], answers[2] if rest else None, temperature=temperature, group=group)
    (weights * kl).sum().backward()
    return *(answer.numpy() for answer in answers), kl.detach().numpy(), mine.grad.numpy()


def _all_of_shards(arrays: list[np.ndarray]) -> list[tuple[Any, ...]]:
    return [_of_shards(arrays, *case) for case in CASES]


@pytest.mark.parallel
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vocabulary_in_parts_has_the_answers_of_the_whole(ranks):
    """On 4 ranks k is more than the columns of a rank."""
    student, teacher, weights = _logits(0), _logits(1), _weights()
    found = run_ranks(ranks, _all_of_shards, [part.numpy() for part in (student, teacher, weights)])
    for index, (k, rest, temperature) in enumerate(CASES):
        whole = student.clone().requires_grad_()
        answers = top_k_answers(teacher, k, vocab=VOCAB)
        wanted = top_k_kl(whole, *answers[:2], answers[2] if rest else None, temperature=temperature)
        (weights * wanted).sum().backward()
        for of_rank in found:
            for part, answer in zip(of_rank[index], (*answers, wanted.detach()), strict=False):
                np.testing.assert_allclose(part, answer, rtol=1e-11, atol=1e-12)
        gradient = np.concatenate([of_rank[index][-1] for of_rank in found], -1)
        np.testing.assert_allclose(gradient, whole.grad, rtol=1e-9, atol=1e-13)
