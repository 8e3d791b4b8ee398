from __future__ import annotations

from typing import Any

import pytest

from nemo_pvs.checkpoints.nemo.fiddle_json import Config, Symbol, dump, find

_ROOT = Config(Symbol("a.module", "Class"), {"size": 3})


def test_what_was_dumped_is_found() -> None:
    assert find(dump(_ROOT), "<root>") == _ROOT
    assert find(dump(_ROOT), "<root>.other") is None


@pytest.mark.parametrize("metadata", [1, {}, {"type": "x", "items": [["one"]]}, {"type": "x", "items": []}, []])
def test_an_object_of_another_form_is_as_good_as_none(metadata: Any) -> None:
    document = dump(_ROOT)
    document["objects"]["class_1"]["metadata"] = metadata
    assert find(document, "<root>") is None
