import importlib
import pkgutil
import subprocess
import sys

import pytest

from tests.megatron.ranks import run_ranks
from tests.megatron.torch_attributes import torch_attributes

pytestmark = pytest.mark.parallel


def _redirected_names():
    from nemo_pvs.megatron.cpu import megatron_on_cpu

    before = torch_attributes()
    with megatron_on_cpu():
        inside = torch_attributes()
    after = torch_attributes()
    return sorted(dict(set(inside.items()) - set(before.items()))), before == after


def _changed_by_importing_the_project():
    import nemo_pvs
    from tests.megatron.preload import BEFORE

    for module in pkgutil.walk_packages(nemo_pvs.__path__, "nemo_pvs."):
        importlib.import_module(module.name)
    after = torch_attributes()
    assert "torch.cuda.current_device" in BEFORE
    return [name for name, value in BEFORE.items() if after.get(name) != value]


def test_importing_the_project_changes_nothing_in_torch():
    """First what we import, in the server that ranks are forked from, then we."""
    assert run_ranks(1, _changed_by_importing_the_project) == [[]]


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
