import torch

from nemo_pvs.megatron.adamw import GroupStepAdamW


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
