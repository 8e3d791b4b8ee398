"""Tests in llama.cpp itself, which ``make test-llamacpp`` compiles; without it they are not collected."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("llama_cpp") is None:
    collect_ignore_glob = ["test_*.py"]
