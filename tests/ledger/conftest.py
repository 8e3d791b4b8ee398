"""What the tests of budgets share with those of reports."""

from __future__ import annotations

from tests.reporting.conftest import results  # noqa: F401
