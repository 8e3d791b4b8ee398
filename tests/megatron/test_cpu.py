import subprocess
import sys

import pytest

from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def _snapshot():
    """Return every attribute of torch and of the classes that the CPU module touches, by identity."""
    import torch

    owners = {"torch": torch, "torch.cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module}
    return {f"{owner}.{name}": id(value) for owner, thing in owners.items() for name, value in vars(thing).items()}


def _redirected_names():
    from nemo_pvs.megatron.cpu import megatron_on_cpu

    before = _snapshot()
    with megatron_on_cpu():
        inside = _snapshot()
    after = _snapshot()
    return sorted(dict(set(inside.items()) - set(before.items()))), before == after


def test_importing_the_project_changes_nothing_in_torch():
    # In a fresh interpreter: first what we import, then we.
    script = """
import importlib, pkgutil
from nemo_pvs.system.megatron_import import import_megatron
import_megatron()
import lightning.pytorch, megatron.core.optimizer, nemo.collections.llm, nemo.lightning, nemo_run, transformers
from tests.megatron.test_cpu import _snapshot
before = _snapshot()
import nemo_pvs
for module in pkgutil.walk_packages(nemo_pvs.__path__, "nemo_pvs."):
    importlib.import_module(module.name)
after = _snapshot()
changed = [name for name in before if before[name] != after.get(name)]
assert not changed, changed
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_leaving_puts_every_name_back():
    [(redirected, restored)] = run_ranks(1, _redirected_names)
    assert {"torch.cuda.current_device", "Tensor.cuda", "Module.cuda", "Tensor.type"} <= set(redirected)
    assert restored


def test_the_launchers_main_module_is_light():
    # Megatron's checkpoint writer spawns a helper that imports the main module again.
    script = (
        "import sys, nemo_pvs.megatron.launch; print([m for m in ('nemo', 'megatron', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
