"""What torch is made of, to see whether something has changed it."""

from __future__ import annotations


def torch_attributes() -> dict[str, int]:
    """Return the identity of every attribute of torch and of the classes that the CPU module touches."""
    import torch

    owners = {"torch": torch, "torch.cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module}
    return {f"{owner}.{name}": id(value) for owner, thing in owners.items() for name, value in vars(thing).items()}
