"""Checkpoints as streams: Hugging Face folders and NeMo checkpoints, one tensor at a time."""

import os

# Every tensor is fresh memory. In huge pages, which PyTorch asks for if told before its first large tensor, that costs
# a third of the processor's time (tests/benchmarks/README.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
