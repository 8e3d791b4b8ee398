"""Tiny models that read any text, byte by byte, and whose answers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import tiny_llama_config

TASKS = Path(__file__).parent / "tasks"
VOCAB = 257


def save_byte_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of one token a byte (and ``<eos>``, token 256) in ``folder`` and return it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def save_byte_model(folder: Path, seed: int = 0, std: float = 0.2, **settings: Any) -> Path:
    """Save a random Llama over bytes, with its tokenizer, in ``folder`` and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(vocab_size=VOCAB, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=std)
        model.save_pretrained(folder)
    return save_byte_tokenizer(folder)
