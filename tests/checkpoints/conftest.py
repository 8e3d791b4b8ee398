"""What tests of sources share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import save_tiny_tokenizer
from tests.forked_commands import ForkedCommands, forked_commands


class Bomb:
    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def assert_same(source, expected):
    assert source._parts.keys() == expected._parts.keys()
    for name in expected._parts:
        got, wanted = source.read(name), expected.read(name)
        assert got.dtype == wanted.dtype, name
        assert torch.equal(got, wanted), name


@pytest.fixture
def hf(make_tiny_llama, tmp_path):
    return save_tiny_tokenizer(make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Iterator[ForkedCommands]:
    """Run Python where only what reads checkpoints is imported, not the hub's library, which reads the environment."""
    modules = [f"nemo_pvs.checkpoints.{name}" for name in ("open", "fingerprint", "fetch")]
    with forked_commands(tmp_path_factory.mktemp("commands") / "outputs", *modules) as run:
        yield run
