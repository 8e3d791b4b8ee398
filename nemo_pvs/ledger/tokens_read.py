"""TokensRead: the tokens that a training run read, so that later training of its weights does not repeat them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_pvs.errors import UserError


@dataclass(frozen=True)
class Wording:
    """Names, for messages, of the settings that determine which tokens are read."""

    seed: str
    sequence_length: str
    first: str
    """With a placeholder for the first token."""
    allow: str


FLAGS = Wording("--data-seed", "--sequence-length", "--first-token {}", "--allow-overlap")
"""The options of ``pvs train``."""
KEYS = Wording(
    "train.data_seed",
    "train.sequence_length",
    "data.token_ranges.pruned: [{}, ...]",
    "data.token_ranges.allow_overlap: true",
)
"""The keys in a recipe."""


@dataclass(frozen=True)
class TokensRead:
    """A range of a token file in training order, which depends only on the seed and the sequence length."""

    data: str
    """Hash of the token file (``data.token_files.token_file_hash``)."""
    seed: int
    """Seed of the order."""
    sequence_length: int
    first: int
    """First token."""
    end: int
    """One past the last token."""

    def check_new(self, before: Iterable[TokensRead], words: Wording = FLAGS) -> None:
        """Refuse to read tokens on which the weights have been trained before.

        Args:
            before: Ranges that the weights and their ancestors have read.
            words: Names of the settings in messages.

        Raises:
            UserError: the ranges overlap, or they belong to different orders of the same tokens.
        """
        same = [read for read in before if read.data == self.data]
        for read in same:
            if (read.seed, read.sequence_length) != (self.seed, self.sequence_length):
                raise UserError(
                    f"The weights were trained on {read.end - read.first:,} tokens of this data in another order "
                    f"({words.seed} {read.seed}, {words.sequence_length} {read.sequence_length}), so tokens that they "
                    f"have seen are mixed with new ones; use that order, other data, or {words.allow}."
                )
        if any(self.first < read.end and read.first < self.end for read in same):
            unread = max(read.end for read in same)
            raise UserError(
                f"The weights were already trained on tokens of this data between {self.first:,} and {self.end:,}; "
                f"start after them with {words.first.format(unread)}, or read them again with {words.allow}."
            )
