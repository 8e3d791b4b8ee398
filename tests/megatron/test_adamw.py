import pytest
import torch

from nemo_pvs.megatron import adamw
from nemo_pvs.megatron.adamw import GroupStepAdamW
from tests.megatron.ranks import run_ranks


def _train(optimizer_class, steps: int, resume_at: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
    bias = torch.nn.Parameter(torch.randn(3, generator=generator))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0, "lr": 0.02}]
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = optimizer_class(groups, **settings)
    for step in range(steps):
        if step and step == resume_at:
            state = optimizer.state_dict()
            optimizer = optimizer_class(groups, **settings)
            optimizer.load_state_dict(state)
        inputs = torch.randn(7, 5, generator=generator)
        optimizer.zero_grad()
        (inputs @ weight + bias).tanh().square().sum().backward()
        optimizer.step()
    return torch.cat([weight.flatten(), bias]).detach()


def test_equals_pytorchs_adamw():
    assert torch.allclose(_train(GroupStepAdamW, 25), _train(torch.optim.AdamW, 25), atol=1e-6)


def test_state_survives_saving():
    assert torch.equal(_train(GroupStepAdamW, 25), _train(GroupStepAdamW, 25, resume_at=10))


def test_state_is_what_megatron_shards():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = GroupStepAdamW([weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["step"] == 1
    assert {name: value.shape for name, value in state["state"][0].items()} == {"exp_avg": (4,), "exp_avg_sq": (4,)}


def _optimizers_of_megatron(gpu: bool, fused: bool) -> tuple[type, bool]:
    """Return which Adam Megatron takes on a machine, and whether it considers it PyTorch's."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from nemo_pvs.megatron.adamw import stand_in_for_fused_adam

    torch.cuda.is_available = lambda: gpu
    if fused:  # what importing Megatron does where Apex is installed
        optimizer.Adam = distrib_optimizer.Adam = torch.optim.SGD
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    stand_in_for_fused_adam()
    assert optimizer.Adam is distrib_optimizer.Adam
    assert distrib_optimizer.HAVE_APEX_OR_TE
    return optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("gpu", "fused", "expected"),
    [
        (True, True, torch.optim.SGD),  # stands for Apex's
        (True, False, GroupStepAdamW),
        (False, True, GroupStepAdamW),  # Apex's runs on GPUs only
        (False, False, GroupStepAdamW),
    ],
)
def test_it_stands_in_where_no_fused_adam_can_run(gpu, fused, expected):
    assert run_ranks(1, _optimizers_of_megatron, gpu, fused) == [(expected, False)]


def test_step_counts_are_on_the_device_of_the_weights(monkeypatch):
    """CUDA's kernel takes them only there."""
    devices = []
    monkeypatch.setattr(adamw, "adamw", lambda *args, **_: devices.extend(step.device.type for step in args[5]))
    weight = torch.nn.Parameter(torch.ones(4, device="meta"))
    weight.grad = torch.ones_like(weight)
    GroupStepAdamW([weight]).step()
    assert devices == ["meta"]
