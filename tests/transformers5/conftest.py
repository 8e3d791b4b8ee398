"""Tests with Transformers 5, which ``make test-transformers5`` installs in a folder; not collected without it."""

from __future__ import annotations

import os

if "PVS_TRANSFORMERS_5" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
