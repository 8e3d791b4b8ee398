"""What the server that ranks are forked from imports, once."""

from nemo_pvs.system.megatron_import import import_megatron

import_megatron()

import nemo_pvs.megatron.pretrain  # noqa: E402, F401
