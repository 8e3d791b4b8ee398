"""What the tests of the verbs share with those of the scaling laws."""

from __future__ import annotations

from tests.scaling.conftest import drawn  # noqa: F401
