"""``python -m nemo_pvs.training.launch``: former name of ``nemo_pvs.megatron.launch``, kept for old batch scripts."""

from __future__ import annotations

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.exit(import_module("nemo_pvs.megatron.launch").main(sys.argv[1:]))
