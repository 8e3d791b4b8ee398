"""JSON and YAML as other programs write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json, read_yaml

READERS = pytest.mark.parametrize("read", [read_json, read_yaml])


@READERS
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read_over(tmp_path: Path, read: Callable[[Path], Any], encoding: str) -> None:
    (tmp_path / "file").write_text('{"größe": 1}\n', encoding=encoding)
    assert read(tmp_path / "file") == {"größe": 1}


@pytest.mark.slow
@READERS
@pytest.mark.parametrize("content", [b"{", b"\xff\xff", b"[" * 10_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, read: Callable[[Path], Any], content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"is not valid (JSON|YAML)") as caught:
        read(tmp_path / "file")
    assert "\n" not in str(caught.value)


@READERS
def test_a_file_that_is_not_there_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "absent", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{path} does not exist"):
            read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
