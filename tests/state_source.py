"""A transformers model in memory as a WeightSource, and a WeightSource as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.checkpoints.tensor_record import TensorRecord, record_of
from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.model.layout import Layout
from tests.conftest import tiny_llama_config


class StateSource:
    """Reads the weights of a model in memory; changing the model changes the source."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.config: dict[str, Any] = model.config.to_dict()
        self.assets: tuple[Path, ...] = ()
        self.reads: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.model.state_dict()[name]

    def checksums(self) -> dict[str, TensorRecord]:
        """Known without a read, as those of a checkpoint on disk are."""
        state = self.model.state_dict()
        return {name: record_of(state[name]) for name in Layout.for_config(self.config).parts(shape_of(self))}


def tiny_model(seed: int = 0, std: float = 0.2, **overrides: Any) -> LlamaForCausalLM:
    """Return a random model whose layers matter: weights are ten times as large as a fresh Llama's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(**overrides)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=std)
    return model


def as_transformers(source: WeightSource) -> LlamaForCausalLM:
    """Build the whole model from every tensor that the weight table names, and nothing else."""
    class_ = model_class(source.config)
    model = class_(class_.config_class.from_dict(dict(source.config))).eval()
    names = Layout.for_config(source.config).parts(shape_of(source))
    missing, unexpected = model.load_state_dict({name: source.read(name) for name in names}, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if source.config["tie_word_embeddings"] else [])
    return model


def random_ids(samples: int, length: int, vocab: int = 128, seed: int = 0) -> torch.Tensor:
    """Return int32 token ids [samples, length]."""
    return torch.randint(0, vocab, (samples, length), generator=torch.Generator().manual_seed(seed)).int()
