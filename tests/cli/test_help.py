"""``--help`` is a few panels of related options, and renamed options say what they are called now."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from typing import Any

import pytest
from typer.models import OptionInfo

from nemo_pvs.cli.verbs import VERBS

_MANY = 10


def options_of(verb: Any) -> dict[str, OptionInfo]:
    hints = inspect.signature(verb, eval_str=True).parameters
    found = {name: typing.get_args(one.annotation)[1:] for name, one in hints.items()}
    return {name: about[0] for name, about in found.items() if about and isinstance(about[0], OptionInfo)}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_many_options_are_in_panels(verb: Any) -> None:
    options = options_of(verb)
    panels = Counter(option.rich_help_panel for option in options.values() if not option.hidden)
    assert all(option.help for option in options.values())
    if len(options) > _MANY:
        assert panels[None] <= 4, "options without a panel"
        assert len(panels) >= 4


@pytest.mark.parametrize("latency", ["12", "3e9", "12 hours", "0ms", "-1ms", "ms", "1e400s"])
def test_a_latency_needs_a_unit(pvs: Any, tmp_path: Any, latency: str) -> None:
    code, out, errors = pvs(
        "search", "absent", "--scores", "absent", "--out", tmp_path / "x", "--parameters", "1e9", "--latency", latency
    )
    assert (code, out) == (2, "")
    assert errors == (
        f"pvs: --latency is {latency!r}; write a time with its unit, such as 12ms, 0.5s or 800us; to bound FLOPs, "
        "give --flops-per-token.\n"
    )
