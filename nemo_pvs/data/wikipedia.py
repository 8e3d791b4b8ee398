"""Extracts plain prose from MediaWiki dumps, such as the small one that ships in gensim's wheel."""

from __future__ import annotations

import bz2
import html
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, iterparse

from nemo_pvs.errors import UserError

MINIMUM_CHARACTERS = 2000
"""Articles with fewer characters of prose are skipped: stubs, lists and disambiguation pages."""

# Shorter lines are leftover table cells, captions and list items.
_SENTENCE_CHARACTERS = 40

_GENSIM_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_REFERENCE = re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE)
# Elements whose content is not prose; of all other elements only the tags are dropped.
_NOT_PROSE = re.compile(
    r"<(ref|math|gallery|source|syntaxhighlight|timeline|imagemap|score)\b[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")

# Innermost constructs: nesting is resolved by repeating the substitution until nothing changes.
_TEMPLATE = re.compile(r"\{\{((?:(?!\{\{|\}\}|\{\|).)*)\}\}", re.DOTALL)
_TABLE = re.compile(r"\{\|(?:(?!\{\||\n\s*\|\}).)*\n\s*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
_URL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*\s*([^\]]*)\]")
_NOT_TEXT = re.compile(r"\s*(?:file|image|media|category|[a-z]{2,3}|[a-z]{2,3}-[a-z]+)\s*:", re.IGNORECASE)

_EMPHASIS = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"(={2,6})\s*(.*?)\s*\1")
_LIST_MARKER = re.compile(r"^[*#:;]+\s*")
_REMAINS_OF_MARKUP = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]|^[|!]")
_EMPTY_PARENTHESES = re.compile(r"\s*\((?:[\s,;:/–-]|or|and)*\)")
_PARENTHESIS_START = re.compile(r"\(\s*(?:[,;:]\s*)*(?=\S)")
_SPACE_BEFORE_STOP = re.compile(r"[ \t]+([,.;:!?)])(?=[\s,.;:!?)]|$)")
_SPACES = re.compile(r"[ \t\u00a0\u2009]+")

_APPENDICES = {
    *("see also", "references", "notes", "notes and references", "references and notes", "footnotes", "citations"),
    *("external links", "further reading", "bibliography", "sources", "works cited", "gallery", "image gallery"),
    *("publications", "filmography", "discography", "works", "selected works", "selected bibliography"),
}


def sample_articles() -> Iterator[tuple[str, str]]:
    """Yield the title and prose of the Wikipedia articles that ship in gensim's wheel.

    The dump is the shortened English Wikipedia dump in gensim's test data (1.7 MB; 106 pages without redirects). Its
    text is licensed CC BY-SA by the authors of Wikipedia. gensim itself is not imported.

    Raises:
        UserError: gensim or its test data is not installed, or the dump is damaged.
    """
    package = importlib.util.find_spec("gensim")
    folders = package.submodule_search_locations if package else None
    dump = Path(folders[0]) / _GENSIM_DUMP if folders else None
    if dump is None or not dump.is_file():
        raise UserError(
            "The corpus wikipedia-sample is part of the gensim package, which is not fully installed; "
            "run pip install 'nemo-pvs[demo]', or give your own corpus."
        )
    try:
        yield from articles(dump)
    except (OSError, EOFError, ParseError) as error:
        raise UserError(f"{dump} is damaged ({error}); install gensim again.") from None


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield the title and prose of every encyclopedia article in a ``pages-articles`` dump (XML, bz2).

    Redirects, other namespaces, list and disambiguation pages and articles shorter than ``MINIMUM_CHARACTERS`` are
    skipped.
    """
    with bz2.open(dump) as file:
        for _, element in iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            title, markup = _title_and_markup(element)
            element.clear()
            text = prose(markup) if markup else ""
            if len(text) >= MINIMUM_CHARACTERS:
                yield title, text


def _title_and_markup(page: Element) -> tuple[str, str]:
    namespace = page.tag.rpartition("}")[0] + "}"
    title = page.findtext(f"{namespace}title") or ""
    is_article = page.findtext(f"{namespace}ns") == "0" and page.find(f"{namespace}redirect") is None
    is_list = title.startswith("List of ") or title.endswith("(disambiguation)")
    markup = page.findtext(f"{namespace}revision/{namespace}text") if is_article and not is_list else None
    return title, markup or ""


def prose(markup: str) -> str:
    """Return the sentences of a wiki page, one paragraph or heading per line.

    Case and punctuation are kept. Tables, templates, references, images, formulas, list items shorter than a sentence
    and the appendices (references, external links etc.) are removed. The text of a few templates that occur within
    sentences is kept.
    """
    text = html.unescape(_COMMENT.sub("", markup)).replace("\u200b", "")
    text = _NOT_PROSE.sub("", _EMPTY_REFERENCE.sub("", text))
    text = _TAG.sub("", _BREAK.sub(" ", text))
    text = _until_stable(text, lambda text: _TABLE.sub("", _TEMPLATE.sub(_template_text, text)))
    text = _until_stable(text, lambda text: _LINK.sub(_link_text, text))
    text = _SWITCH.sub("", _EMPHASIS.sub("", _URL.sub(r"\1", text)))
    return "\n".join(_paragraphs(text))


def _until_stable(text: str, step: Callable[[str], str]) -> str:
    """Repeat ``step``, which resolves the innermost level of nested markup, until it changes nothing."""
    while (changed := step(text)) != text:
        text = changed
    return text


def _template_text(match: re.Match[str]) -> str:
    """Return the text of a template that is part of its sentence; an empty string for all other templates."""
    name, *arguments = (argument.strip() for argument in match[1].split("|"))
    values = [argument for argument in arguments if not re.match(r"\w+\s*=", argument)]
    if not values:
        return ""
    name = name.lower()
    if name in {"convert", "cvt"}:
        return " ".join(values[:2])
    if name in {"lang", "transl", "nihongo", "quote", "nowrap", "small", "smaller", "angbr", "val", "as of", "sc"}:
        return values[1] if name in {"lang", "transl"} and len(values) > 1 else values[0]
    return "".join(values) if name == "chem" else ""


def _link_text(match: re.Match[str]) -> str:
    target, _, label = match[1].partition("|")
    return "" if _NOT_TEXT.match(target) else (label.rpartition("|")[2] or target.lstrip(":"))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that consist of sentences, and the headings that are followed by such a paragraph."""
    heading = ""
    appendix_level = 0  # 0: not inside an appendix
    for block in _blocks(text):
        if match := _HEADING.fullmatch(block):
            level = len(match[1])
            if not appendix_level or level <= appendix_level:
                appendix_level = level if match[2].lower() in _APPENDICES else 0
            heading = match[2]
        elif not appendix_level and _is_prose(block):
            if heading:
                yield heading
            heading = ""
            yield _LIST_MARKER.sub("", block)


def _blocks(text: str) -> Iterator[str]:
    """Yield headings, list items and paragraphs; as in MediaWiki, single line breaks do not end a paragraph."""
    paragraph: list[str] = []
    for line in [*(_tidy(line) for line in text.splitlines()), ""]:
        stands_alone = not line or line[0] in "=*#:;|!"
        if stands_alone and paragraph:
            yield " ".join(paragraph)
            paragraph = []
        if stands_alone and line:
            yield line
        elif line:
            paragraph.append(line)


def _is_prose(block: str) -> bool:
    ends = block.rstrip("\"'”’)").endswith((".", "!", "?", ":", ";", "…"))
    if _LIST_MARKER.match(block):
        first = _LIST_MARKER.sub("", block)[:1]
        ends = ends and (first.isupper() or first in "\"“'")
    return ends and len(block) >= _SENTENCE_CHARACTERS and not _REMAINS_OF_MARKUP.search(block)


def _tidy(line: str) -> str:
    line = _EMPTY_PARENTHESES.sub("", _SPACES.sub(" ", line))
    line = _SPACE_BEFORE_STOP.sub(r"\1", _PARENTHESIS_START.sub("(", line))
    return line.strip()
