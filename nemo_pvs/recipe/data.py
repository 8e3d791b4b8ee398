"""The block ``data`` of a recipe: the text, how it is split, and which tokens each kind of run reads."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from nemo_pvs.recipe.fields import Fraction, Initialisation, RecipeBlock, Tokens, number

Domain = Annotated[str, Field(pattern=r"^[\w.-]+$")]
"""The name of a domain, which is used in file names."""
Range = tuple[Tokens, Tokens]
"""Tokens [first, end) of the training data, counted in training order."""


def _text(value: Any) -> Any:
    """Accept a blend weight that YAML parsed as a number."""
    return str(value) if isinstance(value, (int, float)) else value


class SplitShares(RecipeBlock):
    """Shares of the corpus; each document is in exactly one of them."""

    train: Fraction = 0.85
    validation: Fraction = 0.05
    calibration: Fraction = 0.05
    test: Fraction = 0.05

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitShares:
        if abs(sum(self.model_dump().values()) - 1) > 1e-9:
            raise ValueError("the shares of train, validation, calibration and test must add up to 1")
        return self


class TokenFiles(RecipeBlock):
    """Megatron token files (``.bin`` and ``.idx``) by their path without suffix; the recipe then tokenises nothing."""

    train: str | list[Annotated[str, BeforeValidator(_text)]] | dict[Domain, str]
    """One file, several mixed in proportion to their sizes, a blend (weight, path, weight, path, ...), or one file per
    domain."""
    validation: str | dict[Domain, str]
    """One file, or one per domain."""
    calibration: str
    test: str

    @property
    def blend(self) -> tuple[list[float] | None, list[str]]:
        """The weights of the training files (None if they are mixed in proportion to their sizes) and their paths.

        Raises:
            ValueError: weights and paths do not alternate.
        """
        if isinstance(self.train, dict):
            return None, list(self.train.values())
        entries = [self.train] if isinstance(self.train, str) else self.train
        numbers = [number(entry) for entry in entries]
        if all(value is None for value in numbers) and entries:
            return None, entries
        weights, paths = [weight for weight in numbers[::2] if weight is not None], entries[1::2]
        alternate = len(weights) == len(paths) == len(numbers[::2]) and all(value is None for value in numbers[1::2])
        if not entries or not alternate:
            raise ValueError("the training files must be paths, or weights and paths in alternation")
        return weights, paths

    @model_validator(mode="after")
    def _can_be_blended(self) -> TokenFiles:
        _ = self.blend
        train, validation = (
            set(files) if isinstance(files, dict) else set() for files in (self.train, self.validation)
        )
        for name in sorted(train ^ validation):
            missing = "validation" if name in train else "train"
            raise ValueError(f"domain {name} has no {missing} file; give one, or leave the domain out")
        return self


class TokenRanges(RecipeBlock):
    """Which tokens of the training data each kind of run reads, as [first, end), in training order."""

    parent: Range | None = None
    """Tokens that the parent was trained on, if it was trained on the same data with the same seed."""
    pruned: Range | None = None
    """Tokens for pruned arms; each reads its budget from ``first`` on. Defaults to [0, infinity)."""
    random: Range | None = None
    """Tokens for arms from random weights, likewise."""
    allow_overlap: bool = False
    """Let pruned arms read tokens that the parent was trained on."""

    def of(self, initialisation: Initialisation) -> tuple[int, float]:
        """Return the token range of arms with this initialisation; the end may be infinite."""
        first, end = getattr(self, initialisation) or (0, float("inf"))
        return int(first), end

    def start_of_pruned(self, given: float | None, tokens_per_step: int) -> int:
        """Return the first token of the training before pruning, rounded up to whole steps.

        Args:
            given: The first token if the recipe states it; by default the first of pruned arms.
            tokens_per_step: Tokens per optimizer step.
        """
        first = self.of("pruned")[0] if given is None else int(given)
        return -(-first // tokens_per_step) * tokens_per_step

    @model_validator(mode="after")
    def _can_be_read(self) -> TokenRanges:
        for name in ("parent", "pruned", "random"):
            given = getattr(self, name)
            if given and given[0] >= given[1]:
                raise ValueError(f"the range of {name} ends before it begins")
        first, end = self.of("pruned")
        if self.parent and not self.allow_overlap and first < self.parent[1] and self.parent[0] < end:
            raise ValueError(
                f"pruned arms would read tokens that the parent was trained on ({self.parent[0]:,} to "
                f"{self.parent[1]:,}); move their range, or set allow_overlap: true"
            )
        return self


class Data(RecipeBlock):
    """The text for training, calibration and evaluation: ``source`` or ``token_files``."""

    source: str | list[str] | dict[Domain, str | list[str]] | None = None
    """Files or folders (.txt, .jsonl[.gz|.zst], .parquet), or the built-in name ``wikipedia-sample``; or these per
    domain, whose calibration and test splits are concatenated."""
    token_files: TokenFiles | None = None
    split: SplitShares = SplitShares()
    seed: int = 0
    """Seed for the split."""
    token_ranges: TokenRanges = TokenRanges()

    @property
    def domains(self) -> list[str]:
        """The domains whose shares ``dynamic_loading`` sets; empty if the text is not divided into domains."""
        texts = self.token_files.train if self.token_files else self.source
        return list(texts) if isinstance(texts, dict) else []

    @model_validator(mode="after")
    def _is_one_thing(self) -> Data:
        if (self.source is None) == (self.token_files is None):
            raise ValueError("give either source or token_files")
        if self.domains and self.token_ranges != TokenRanges():
            raise ValueError("token_ranges does not apply to text with domains; leave token_ranges out")
        return self
