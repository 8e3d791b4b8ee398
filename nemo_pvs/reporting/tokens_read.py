"""TokensRead: which tokens a training read, so that a later one of the same weights does not read them unawares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_pvs.errors import UserError


@dataclass(frozen=True)
class TokensRead:
    """A range of a token file in the order of training, which depends on the seed and the sequences' length alone."""

    data: str
    """Hash of the token file (``data.token_files.token_file_hash``)."""
    seed: int
    sequence_length: int
    first: int
    end: int
    """Behind the last one."""

    def check_new(self, before: Iterable[TokensRead]) -> None:
        """Refuse to read what weights have been trained on before.

        Args:
            before: What their ancestors have read.

        Raises:
            UserError: the ranges overlap, or they belong to different orders of the same tokens.
        """
        same = [read for read in before if read.data == self.data]
        for read in same:
            if (read.seed, read.sequence_length) != (self.seed, self.sequence_length):
                raise UserError(
                    f"The weights were trained on {read.end - read.first:,} tokens of this data in another order "
                    f"(--seed {read.seed}, --sequence-length {read.sequence_length}), which mixes new ones with them; "
                    "take that order, other data, or --allow-overlap."
                )
        if any(self.first < read.end and read.first < self.end for read in same):
            unread = max(read.end for read in same)
            raise UserError(
                f"The weights were trained on tokens of this data between {self.first:,} and {self.end:,} already; "
                f"begin behind them with --first-token {unread}, or read them again with --allow-overlap."
            )
