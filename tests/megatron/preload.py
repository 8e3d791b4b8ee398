"""What the server that ranks are forked from imports, once; as the launcher does, without collecting garbage."""

import gc

gc.disable()

import importlib  # noqa: E402
import pkgutil  # noqa: E402

from nemo_pvs.system.megatron_import import import_megatron  # noqa: E402

import_megatron()

import lightning.pytorch  # noqa: E402, F401
import megatron.core.optimizer  # noqa: E402, F401
import nemo.collections.llm  # noqa: E402
import nemo.lightning  # noqa: E402, F401
import nemo_run  # noqa: E402, F401
import transformers  # noqa: E402, F401

import nemo_pvs  # noqa: E402
from tests.megatron.torch_attributes import torch_attributes  # noqa: E402

BEFORE = torch_attributes()
"""Of torch, when everything that we import is imported, and we are not."""
for module in pkgutil.walk_packages(nemo_pvs.__path__, "nemo_pvs."):
    importlib.import_module(module.name)
AFTER = torch_attributes()

gc.freeze()
gc.enable()
