"""What the server that ranks are forked from imports, once; as the launcher does, without collecting garbage."""

import gc

gc.disable()

from nemo_pvs.system.megatron_import import import_megatron  # noqa: E402

import_megatron()

import lightning.pytorch  # noqa: E402, F401
import megatron.core.optimizer  # noqa: E402, F401
import nemo.collections.llm  # noqa: E402
import nemo.lightning  # noqa: E402, F401
import nemo_run  # noqa: E402, F401
import transformers  # noqa: E402, F401

from tests.megatron.torch_attributes import torch_attributes  # noqa: E402

BEFORE = torch_attributes()
"""Of torch, when everything that we import is imported, and we are not."""

import nemo_pvs.megatron.rank  # noqa: E402
import nemo_pvs.pipeline.series  # noqa: E402
import nemo_pvs.reporting.html  # noqa: E402, F401
import tests.conftest  # noqa: E402, F401

gc.freeze()
gc.enable()
