"""What the server that ranks are forked from imports, once; as the launcher does, without collecting garbage."""

import gc

gc.disable()

from nemo_pvs.system.megatron_import import import_megatron  # noqa: E402

import_megatron()

import nemo_pvs.megatron.rank  # noqa: E402, F401

gc.freeze()
gc.enable()
