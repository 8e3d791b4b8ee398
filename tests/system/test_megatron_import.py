"""Importing Megatron compiles nothing, and refuses a Transformer Engine that would break it with a traceback."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
from torch.utils import cpp_extension

from nemo_pvs.errors import UserError
from nemo_pvs.system import transformer_engine
from nemo_pvs.system.megatron_import import import_megatron

_ALLOCATOR = "megatron.core.inference.unified_memory"


@pytest.mark.timeout(60)
def test_a_lock_that_a_killed_rank_left_holds_nobody_up(tmp_path, monkeypatch):
    """PyTorch waits for the lock of a compilation as long as the file is there, with or without a CUDA toolkit."""
    lock = tmp_path / "managed_alloc_runtime" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    compile_inline = cpp_extension.load_inline
    monkeypatch.delitem(sys.modules, _ALLOCATOR)
    import_megatron()
    assert not sys.modules[_ALLOCATOR].has_unified_memory
    assert cpp_extension.load_inline is compile_inline
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [lock], "something was compiled"


def test_a_toolkit_without_a_device_is_no_reason_for_a_warning():
    """A PyTorch for CUDA gives one wherever it finds a toolkit and no device, as on a login node."""
    import_megatron()
    assert not cpp_extension.logger.isEnabledFor(logging.WARNING)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Install a package transformer_engine whose PyTorch layers consist of the given code."""

    def install(code: str) -> None:
        folder = tmp_path / "site" / "transformer_engine"
        (folder / "pytorch").mkdir(parents=True)
        # As the real one, whose import succeeds where that of its layers does not.
        (folder / "__init__.py").write_text("try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
        (folder / "pytorch" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder.parent))

    def forget() -> None:
        transformer_engine.import_problem.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]

    forget()
    yield install
    forget()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10\\nmore')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("assert False", "AssertionError: no message"),
    ],
)
def test_a_broken_transformer_engine_is_not_one_and_says_why(engine, code, reason, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    engine(code)
    assert transformer_engine.is_installed()
    assert transformer_engine.import_problem() == reason
    with pytest.raises(UserError) as refused:
        import_megatron()
    assert reason in str(refused.value)
    assert "--no-build-isolation" in str(refused.value)
    assert "pip uninstall" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_that_is_broken_where_no_gpu_is_is_hidden_from_megatron(engine):
    """As on a login node, where the driver's library is missing."""
    engine("raise OSError('libcuda.so.1: cannot open')")
    import_megatron()
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")
    assert not transformer_engine.is_installed()


def test_one_that_imports_is_one(engine):
    engine("Linear = object")
    assert transformer_engine.import_problem() is None
    import_megatron()


@pytest.mark.skipif(transformer_engine.is_installed(), reason="it is installed")
def test_where_there_is_none_nothing_is_refused():
    transformer_engine.import_problem.cache_clear()
    assert transformer_engine.import_problem() == "it is not installed"
    import_megatron()
