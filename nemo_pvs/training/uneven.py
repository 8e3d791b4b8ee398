"""The earlier place of ``nemo_pvs.megatron.uneven``: checkpoints of earlier versions name it, and NeMo imports it.

It is imported by name, because this package stands below ``nemo_pvs.megatron`` and imports no NeMo itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("nemo_pvs.megatron.uneven"), name)
