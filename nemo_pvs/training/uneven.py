"""Former name of ``nemo_pvs.megatron.uneven``, which NeMo imports to read the checkpoints of ``tests/unchanged``.

The module is imported lazily by name, because this package may not depend on ``nemo_pvs.megatron`` or import NeMo.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("nemo_pvs.megatron.uneven"), name)
