"""What the server that ranks are forked from imports, once."""

from nemo_pvs.megatron_import import import_megatron

import_megatron()

import nemo_pvs.pipeline  # noqa: E402
import nemo_pvs.training.recipe  # noqa: E402, F401
