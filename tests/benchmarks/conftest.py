"""What many benchmarks read."""

from itertools import islice

import pytest

from nemo_pvs.data import wikipedia


@pytest.fixture
def few_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Wikipedia sample end after ten articles; it takes seconds to read, and no benchmark's test needs it."""
    pytest.importorskip("gensim", reason="the text is in gensim's wheel")
    whole = wikipedia.sample_articles
    monkeypatch.setattr(wikipedia, "sample_articles", lambda: islice(whole(), 10))
