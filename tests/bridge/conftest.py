"""Tests on Megatron-Bridge itself, which ``make test-bridge`` installs; without it they are not collected."""

from __future__ import annotations

import importlib.util

from tests.bridge import stub

if importlib.util.find_spec("megatron.bridge"):
    stub.install()  # before Megatron is imported
else:
    collect_ignore_glob = ["test_*.py"]
