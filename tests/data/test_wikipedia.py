from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from nemo_pvs.data.wikipedia import MINIMUM_CHARACTERS, articles, prose, sample_articles

from .conftest import needs_wikipedia_sample

SENTENCE = "The aardvark is a medium-sized, burrowing, nocturnal mammal native to Africa."
PAGE = f"""{{{{Infobox animal | name = Aardvark | range = {{{{nested|1}}}} | table = yes }}}}
[[File:Aardvark.jpg|thumb|A caption with a [[link]] and a [http://example.org url].]]
The '''aardvark''' ({{{{IPA|x}}}}; ''Orycteropus afer'') is a [[mammal|medium-sized]], burrowing,
nocturnal animal&nbsp;native to [[Africa]].<ref name="a/b" /><ref>{{{{cite|last=Doe}}}} A note.</ref> It weighs
{{{{convert|60|kg|lb}}}}.

== Table ==
{{| class="wikitable"
|-
| one || two [[three]]
|
A sentence in a cell of a table, although it reads like any other sentence.
|-
{{|
| inner
|}}
|}}

== Habits ==
=== Food ===
* It eats ants and termites, which it digs out of their hills at night.
* ants
* not a sentence although it is of more than forty characters
<!-- {SENTENCE} -->
In [[Bantu languages]] its name is {{{{lang|nl|aardvarken}}}} , see [http://example.org the name].

== References ==
{SENTENCE}
=== Books ===
{SENTENCE}
== Later ==
{SENTENCE}
[[Category:Mammals]] [[de:Erdferkel]]
"""


def test_a_page_becomes_its_sentences_and_nothing_else() -> None:
    assert prose(PAGE).splitlines() == [
        "The aardvark (Orycteropus afer) is a medium-sized, burrowing, nocturnal animal native to Africa. "
        "It weighs 60 kg.",
        "Food",
        "It eats ants and termites, which it digs out of their hills at night.",
        "In Bantu languages its name is aardvarken, see the name.",
        "Later",
        SENTENCE,
    ]


def test_parentheses_that_a_template_leaves_empty_go() -> None:
    text = "Albert Einstein ({{IPA|x}}; {{lang-de|y}}) was a physicist ({{x}}, or {{y}}) of the twentieth century."
    assert prose(text) == "Albert Einstein was a physicist of the twentieth century."


def _page(title: str, text: str, *, namespace: str = "0", extra: str = "") -> str:
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><id>1</id>{extra}"
        f"<revision><id>2</id><text>{text}</text></revision></page>"
    )


def test_only_long_articles_are_taken_from_a_dump(tmp_path: Path) -> None:
    long = " ".join([SENTENCE] * (MINIMUM_CHARACTERS // len(SENTENCE) + 1))
    exactly = "A" * (MINIMUM_CHARACTERS - 1) + "."
    pages = [
        _page("Aardvark", long),
        _page("Exactly long enough", exactly),
        _page("One character short", exactly[1:]),
        _page("Earth pig", long, extra='<redirect title="Aardvark" />'),
        _page("Talk:Aardvark", long, namespace="1"),
        _page("List of aardvarks", long),
        _page("Aardvark (disambiguation)", long),
    ]
    dump = tmp_path / "dump.xml.bz2"
    namespace = "http://www.mediawiki.org/xml/export-0.10/"
    dump.write_bytes(bz2.compress(f'<mediawiki xmlns="{namespace}">{"".join(pages)}</mediawiki>'.encode()))
    assert list(articles(dump)) == [("Aardvark", long), ("Exactly long enough", exactly)]


@pytest.mark.slow
@needs_wikipedia_sample
def test_the_sample_is_clean_prose_of_known_size() -> None:
    sample = dict(sample_articles())
    text = "\n".join(sample.values())
    assert len(sample) == 88
    assert 2_600_000 < len(text) < 2_750_000
    assert "Albert Einstein (14 March 1879 – 18 April 1955) was a German-born theoretical physicist." in text
    for markup in (
        "[[",
        "]]",
        "{{",
        "}}",
        "''",
        "==",
        "<ref",
        "</",
        "&nbsp;",
        "http://",
        "  ",
        "()",
        "( ",
        "wikitable",
    ):
        assert markup not in text, markup
    lines = text.splitlines()
    assert sum(line.endswith((".", '"', ":", "!", "?", ")", "'", "”", ";", "’", "…")) for line in lines) > 0.7 * len(
        lines
    )
