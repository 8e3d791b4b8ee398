"""Former name of ``nemo_pvs.megatron.uneven``; NeMo imports it to read checkpoints that earlier versions wrote.

The module is imported lazily by name, because this package may not depend on ``nemo_pvs.megatron`` or import NeMo.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("nemo_pvs.megatron.uneven"), name)
