import pytest
import torch

from tests.benchmarks import teacher_cache
from tests.benchmarks.teacher_cache import KINDS, losses_table, make_job, steps_of


@pytest.mark.parallel
@pytest.mark.slow
def test_steps_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "VOCAB", 256)
    job = make_job(tmp_path, layers=2, steps=4, hidden_size=64, intermediate_size=64)
    found = steps_of(job)
    assert [*found] == [*KINDS]
    assert all(0 < wall < 60 and 0 < cpu < 60 for wall, cpu in found.values())


def test_more_tokens_lose_less():
    """All tokens lose nothing; with the rest as one more class nothing is left out of the loss."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 200, generator=generator) for _ in range(2))
    table = losses_table(student, teacher)
    cells = [list(column.cells) for column in table.columns]
    errors = {row[:3]: float(row[6]) for row in zip(*cells, strict=True)}
    for how in ("renormalise", "class"):
        assert errors["8", how, "fp32"] > errors["32", how, "fp32"] > errors["128", how, "fp32"]
        assert errors["200", how, "fp32"] < 1e-3
        assert errors["200", how, "fp32"] < errors["200", how, "fp16"] < errors["200", how, "bf16"]
    assert errors["8", "class", "fp32"] < errors["8", "renormalise", "fp32"]
