"""TokensRead: which tokens a training read, so that a later one of the same weights does not read them unawares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_pvs.errors import UserError


@dataclass(frozen=True)
class Wording:
    """What a user calls the settings that decide which tokens are read."""

    seed: str
    sequence_length: str
    first: str
    """With a place for the first token."""
    allow: str


FLAGS = Wording("--data-seed", "--sequence-length", "--first-token {}", "--allow-overlap")
"""On the command line of ``pvs train``."""
KEYS = Wording(
    "train.data_seed",
    "train.sequence_length",
    "data.token_ranges.pruned: [{}, ...]",
    "data.token_ranges.allow_overlap: true",
)
"""In a recipe."""


@dataclass(frozen=True)
class TokensRead:
    """A range of a token file in the order of training, which depends on the seed and the sequences' length alone."""

    data: str
    """Hash of the token file (``data.token_files.token_file_hash``)."""
    seed: int
    """Of the order."""
    sequence_length: int
    first: int
    end: int
    """After the last one."""

    def check_new(self, before: Iterable[TokensRead], words: Wording = FLAGS) -> None:
        """Refuse to read what weights have been trained on before.

        Args:
            before: What their ancestors have read.
            words: What the user calls the settings.

        Raises:
            UserError: the ranges overlap, or they belong to different orders of the same tokens.
        """
        same = [read for read in before if read.data == self.data]
        for read in same:
            if (read.seed, read.sequence_length) != (self.seed, self.sequence_length):
                raise UserError(
                    f"The weights were trained on {read.end - read.first:,} tokens of this data in another order "
                    f"({words.seed} {read.seed}, {words.sequence_length} {read.sequence_length}), so tokens that they "
                    f"have read are mixed with new ones; use that order, other data, or {words.allow}."
                )
        if any(self.first < read.end and read.first < self.end for read in same):
            unread = max(read.end for read in same)
            raise UserError(
                f"The weights were trained on tokens of this data between {self.first:,} and {self.end:,} already; "
                f"begin after them with {words.first.format(unread)}, or read them again with {words.allow}."
            )
