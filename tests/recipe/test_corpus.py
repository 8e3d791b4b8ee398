"""The text of the paper in small: how packages are read, on packages made by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
from nemo_pvs.recipes.paper_in_small import corpus
from nemo_pvs.recipes.paper_in_small.corpus import SOURCES, Source, documents, download

PARAGRAPH = "The parent is pruned and trained again, paragraph {}."


def _deb(files: dict[str, bytes]) -> bytes:
    """Return a Debian package: an ar archive whose members are padded to even sizes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("control.tar.xz", b"x"), ("data.tar.xz", data.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
        package += header + content + b"\n" * (len(content) % 2)
    return package


def test_a_dictionary_is_read_entry_by_entry() -> None:
    entries = "Lapidate \\Lap\\, v. t.\n   To stone. [Obs.]\n   [1913 Webster]\n\nLapidation, n.\n   Stoning."
    package = _deb({"dictd/gcide.dict.dz": gzip.compress(entries.encode()), "doc/copyright": b"GPL"})
    (section,) = SOURCES["webster"].read(package)
    assert [" ".join(entry.split()) for entry in section] == [
        "Lapidate \\Lap\\, v. t. To stone. [Obs.]",
        "Lapidation, n. Stoning.",
    ]


def test_a_sword_module_is_read_by_its_index() -> None:
    books = ["<p>In the <w>beginning</w> , God</p><note>Elohim</note> said .", "<p>Another book</p>"]
    blocks = [zlib.compress(book.encode()) for book in books]
    gap = b"between"  # what no index names is no text
    index = struct.pack("<III", 0, len(blocks[0]), 0) + struct.pack("<III", len(blocks[0] + gap), len(blocks[1]), 0)
    package = _deb({"sword/ot.bzz": blocks[0] + gap + blocks[1], "sword/ot.bzs": index, "sword/ot.bzv": b"no"})
    sections = [[" ".join(part.split()) for part in section] for section in SOURCES["bible"].read(package)]
    assert sections == [["", "In the beginning, God", "said."], ["", "Another book", ""]]


def test_descriptions_are_read_at_any_depth_and_nothing_else() -> None:
    described = {"documentation": "<p>One &amp; two</p>", "shapes": [{"name": "no", "x": {"documentation": "Three"}}]}
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("botocore/data/s3/service-2.json.gz", gzip.compress(json.dumps(described).encode()))
        archive.writestr("botocore/data/s3/paginators-1.json", json.dumps({"documentation": "no"}))
    (section,) = SOURCES["aws"].read(wheel.getvalue())
    assert [part.strip() for part in section if part.strip()] == ["One & two", "Three"]


def test_documents_are_whole_paragraphs_and_none_twice() -> None:
    seen: set[bytes] = set()
    once = [PARAGRAPH.format(number) for number in range(8)]
    again = [once[0].upper(), "short", "1234567890 " * 9, *once]
    (document,) = documents([once, again], seen)
    assert document.split("\n\n") == once
    assert list(documents([once], seen)) == []


def test_a_long_section_is_cut_between_paragraphs() -> None:
    section = [PARAGRAPH.format(number) + " word" * 100 for number in range(60)]
    cut = list(documents([section], set()))
    assert [paragraph for document in cut for paragraph in document.split("\n\n")] == section
    assert all(corpus.LONGEST_DOCUMENT <= len(document) < corpus.LONGEST_DOCUMENT + 700 for document in cut[:-1])


def test_a_package_is_taken_from_the_folder_and_never_another_one(tmp_path: Path) -> None:
    content = b"the package"
    source = Source(
        (tmp_path / "elsewhere" / "x.deb").as_uri(), hashlib.sha256(content).hexdigest(), "free", lambda _: iter(())
    )
    with pytest.raises(SystemExit, match=r"cannot be downloaded .*put the file into"):
        download(source, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.deb").write_bytes(b"another package")
    with pytest.raises(SystemExit, match="is not the file that was pinned"):
        download(source, tmp_path)
    assert not (tmp_path / "x.deb").exists()
    (tmp_path / "x.deb").write_bytes(content)
    assert download(source, tmp_path) == content
    assert all(source.licence and len(source.sha256) == 64 for source in SOURCES.values())
