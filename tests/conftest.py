"""What many tests share: tiny random Llamas in the Hugging Face format."""

from __future__ import annotations

import gc
import inspect
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import LlamaConfig

# Nothing that takes long to import is imported above: pytest-xdist's controller, which runs no test, loads this file.

os.environ.pop("COLUMNS", None)  # workers of pytest-xdist have it; output is as wide as in a log
# One thread in each process, or those of several tests spin while they wait for each other on the same cores. Also
# in the processes that tests start, where Lightning would otherwise take a thread for each core.
os.environ["OMP_NUM_THREADS"] = "1"
CACHE = tempfile.mkdtemp(prefix="nemo_pvs_cache_")  # for checksums of the tests' models
os.environ["XDG_CACHE_HOME"] = CACHE

_MORE = 10

settings.register_profile("suite", deadline=None, max_examples=100)
settings.register_profile("full", deadline=None, max_examples=100 * _MORE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="many more cases of every test that draws its cases")


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores these for what it starts in the background or under nohup; so would all that tests start.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    settings.load_profile("full" if config.getoption("full") else "suite")
    if not asks_for_gpu(config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch is imported, also in what tests start


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_report_header() -> str:
    """Return the versions that the tests run with, since targets of the Makefile put others in front."""
    from nemo_pvs.doctor.packages import installed_version

    names = ("nemo-toolkit", "megatron-core", "transformers")
    return ", ".join(f"{name} {installed_version(name) or 'unknown'}" for name in names)


def asks_for_gpu(marks: str) -> bool:
    """Return whether ``-m`` names the tests that need a GPU; all others run on the CPU, also where there is one."""
    return re.search(r"(?<!not )\bgpu\b", marks) is not None


def cases(number: int) -> int:
    """Return how many cases a test draws: ``number`` of them in ``make test``, more in ``make test-full``."""
    return number * settings.default.max_examples // settings.get_profile("suite").max_examples


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without collecting garbage, which would go through all that is imported again and again."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


def pytest_collectstart() -> None:
    from nemo_pvs.system.megatron_import import import_megatron

    import_megatron()  # before any test module imports a part of it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU unless ``-m`` asks for it, and put the files that take long first.

    Otherwise, at the end, one worker has a long file and the others nothing to do.
    """
    if not asks_for_gpu(config.getoption("markexpr")):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]

    def rank(item: pytest.Item) -> int:
        return sum(item.get_closest_marker(name) is not None for name in ("parallel", "slow"))

    ranks: dict[Path, int] = {}
    for item in items:
        ranks[item.path] = max(rank(item), ranks.get(item.path, 0))
    items.sort(key=lambda item: -ranks[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield from _without_nemo(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from _without_nemo(item)


def _without_nemo(item: pytest.Item) -> Iterator[None]:
    """Fail a test of ``make test-quick`` that imports NeMo, which takes as long as hundreds of its tests."""
    before = "nemo" in sys.modules
    yield
    if "nemo" in sys.modules and not before and not any(map(item.get_closest_marker, ("parallel", "slow"))):
        pytest.fail("This test imports NeMo: mark it slow, or make test-quick is no longer quick.")


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """Return the config of a Llama that takes milliseconds; its head_dim is not hidden / heads, on purpose."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
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
    return LlamaConfig(**{**sizes, **overrides})


def make_tiny_llama(
    folder: Path,
    seed: int = 0,
    dtype: Any = None,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a randomly initialised tiny Llama (every norm weight random too) in ``folder`` and return ``folder``.

    ``dtype`` is float32 by default.
    """
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(**overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
        model.to(dtype or torch.float32).save_pretrained(folder, max_shard_size=max_shard_size)
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
def forked_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process's trainings launched from the server that has imported NeMo, not by fresh interpreters."""
    from nemo_pvs.training import trainer
    from tests.megatron.launcher import ForkedLauncher

    monkeypatch.setattr(trainer, "_launch", ForkedLauncher)


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
