"""Splits a corpus by whole documents, reproducibly and with no text in two splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

from nemo_pvs.data.corpus import Document
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_bytes


def split_documents(
    documents: Iterable[Document],
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    divided: dict[str, str] | None = None,
) -> dict[str, list[Document]]:
    """Divide documents among named splits, each of which gets its fraction of the characters.

    The result depends only on the texts and the seed, not on their order or on file names. Documents with equal texts
    stay together, so no text is in two splits. In the order of the SHA-256 of seed and text, each text is assigned to
    a split that is still empty, or else to the one that lacks the most characters. No split exceeds its share by more
    than one text (and its copies), and none is empty if there are at least as many texts as splits.

    Args:
        documents: The corpus, which is held in memory.
        fractions: Split name to share of the characters, e.g. ``{"train": 0.9, "validation": 0.1}``; they add up to 1.
        seed: Seed of the split.
        divided: The splits of the texts of other corpora, by their hashes, so that a text that several corpora have is
            in one split; those of this one are added. None if there are no others.

    Raises:
        UserError: the fractions are not positive numbers that add up to 1, or there are fewer texts than splits.
    """
    if not fractions or min(fractions.values()) <= 0 or not abs(sum(fractions.values()) - 1) < 1e-6:
        given = ", ".join(f"{name} {fraction:g}" for name, fraction in fractions.items())
        raise UserError(f"The fractions of a split must be positive and add up to 1, not: {given or 'none'}.")
    same_text: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        same_text[sha256_bytes(f"{seed}:{document.text}".encode())].append(document)
    if len(same_text) < len(fractions):
        raise UserError(
            f"{len(same_text)} different document(s) cannot fill the {len(fractions)} splits {', '.join(fractions)}; "
            "add documents, or divide long ones."
        )
    total = sum(len(document.text) for copies in same_text.values() for document in copies)
    missing = {name: fraction * total for name, fraction in fractions.items()}
    splits: dict[str, list[Document]] = {name: [] for name in fractions}
    divided = {} if divided is None else divided
    for digest, copies in sorted(same_text.items(), key=lambda text: (text[0] not in divided, text[0])):
        neediest = max(fractions, key=lambda name: (not splits[name], missing[name]))
        split = divided.setdefault(digest, neediest)
        splits[split].extend(copies)
        missing[split] -= sum(len(document.text) for document in copies)
    return splits


def split_of(text: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the split of a document: that into whose share its SHA-256 with the seed falls, as a number from 0 to 1.

    So the split depends only on the text and the seed, copies of a text stay together, and workers need not
    communicate. Shares are met on average, not exactly; ``split_documents`` is exact, for small corpora.
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return name
