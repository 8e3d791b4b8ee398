"""Scores of tokens from logits that ranks share by columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed

from nemo_pvs.layerwise import token_scores
from tests.megatron.ranks import run_ranks

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

SHARDS = [(0, 12), (12, 15)]
"""First column of each rank, and one past its last: the second has a quarter of what the first has."""


def _logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 15, generator=generator) * 5, torch.randint(0, 15, (2, 5), generator=generator)


def _scores() -> list[np.ndarray]:
    distributed.init_process_group("gloo")
    token_scores._LOGITS_AT_ONCE = 24  # two tokens of twelve columns, eight of three
    logits, targets = _logits_and_targets()
    first, end = SHARDS[distributed.get_rank()]
    scores = token_scores.next_token_scores(
        logits[..., first:end], targets, first_column=first, group=distributed.group.WORLD
    )
    distributed.destroy_process_group()
    return [values.numpy() for values in scores]


def test_ranks_with_unequal_columns_take_the_same_parts():
    logits, targets = _logits_and_targets()
    expected = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for logprobs, greedy in run_ranks(2, _scores):
        torch.testing.assert_close(torch.from_numpy(logprobs).double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.from_numpy(greedy), logits.argmax(-1) == targets)
