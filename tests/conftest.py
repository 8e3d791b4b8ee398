"""What many tests share: tiny random Llamas in the Hugging Face format."""

from __future__ import annotations

import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.pop("COLUMNS", None)  # workers of pytest-xdist have it; output is as wide as in a log

from nemo_pvs.system.megatron_import import import_megatron

torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="nemo_pvs_cache_")  # for checksums of the tests' models
import_megatron()  # before any test module imports a part of it


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """Return the config of a Llama that takes milliseconds; its head_dim is not hidden / heads, on purpose."""
    settings: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**{**settings, **overrides})


def make_tiny_llama(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a randomly initialised tiny Llama (every norm weight random too) in ``folder`` and return ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(**overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(name="tiny_llama_config")
def tiny_llama_config_fixture() -> Callable[..., LlamaConfig]:
    return tiny_llama_config


@pytest.fixture(name="make_tiny_llama")
def make_tiny_llama_fixture() -> Callable[..., Path]:
    return make_tiny_llama


def save_tiny_tokenizer(folder: Path, vocab: int = 128) -> Path:
    """Save a tokenizer of one token a word (``w3`` is token 3, the end of text 0) in ``folder``; return ``folder``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1, **{f"w{index}": index for index in range(2, vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


class Outcome(NamedTuple):
    """What a command has ended with."""

    code: int
    output: str
    errors: str


_OF_OTHER_PROGRAMS = {"repo-type", "local-dir", "no-deps", "nproc-per-node", "ckpt-convert-format"}


def _check_advice(verb: str, message: str) -> None:
    """Fail where a message names an option that its command does not have; ``pvs OTHER --option`` is another's."""
    from nemo_pvs.cli.verbs import VERBS

    options = {
        known.__name__.replace("_", "-"): {name.replace("_", "-") for name in inspect.signature(known).parameters}
        for known in VERBS
    }
    for command, option in re.findall(r"(?:pvs ([a-z-]+) )?(?<![\w-])--([a-z][\w-]*)", message):
        command = command or verb
        if command in options and option not in _OF_OTHER_PROGRAMS:
            known = options[command]
            assert option in known or option.removeprefix("no-") in known, f"{command} has no --{option}: {message}"


@pytest.fixture
def pvs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``pvs`` with arguments in this process, which has imported what is slow to import."""
    from nemo_pvs.cli.main import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pvs", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        captured = capsys.readouterr()
        _check_advice(str(arguments[0]) if arguments else "", captured.err)
        return Outcome(code, captured.out, captured.err)

    return run
