"""Which sample of which domain comes next in a training whose domains have shares that change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nemo_pvs.errors import UserError


class DomainOrder:
    """An order over the samples of several domains, each read from its own place on and never anew.

    Every sample of a batch is of a domain drawn by the shares, as the published code of Sheared LLaMA does it, so a
    batch has each domain's share in expectation. The draw depends on the seed, the step and the shares alone, and the
    place within a domain on what was drawn before: so every rank of every layout finds the same batches, however it
    shares them out. Within a domain samples come in the domain's own order.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        taken: Mapping[str, int],
        *,
        batch: int,
        seed: int,
    ) -> None:
        """Prepare.

        Args:
            sizes: How many samples each domain has; the order of its keys is that of the domains.
            shares: Of the domains at first.
            taken: Samples of each domain that were read before.
            batch: Samples of a step.
            seed: Of the draws.
        """
        self.names = list(sizes)
        self.step = 0
        self.batch = batch
        self.seed = seed
        self._sizes = np.array([sizes[name] for name in self.names])
        self._shares = np.array([shares[name] for name in self.names])
        self._taken = np.array([taken[name] for name in self.names])
        self._read = -1
        self._places: list[tuple[int, int]] = []

    @property
    def shares(self) -> dict[str, float]:
        """Of the domains now."""
        return dict(zip(self.names, self._shares.tolist(), strict=True))

    @property
    def taken(self) -> dict[str, int]:
        """Samples of each domain read before ``step``."""
        return dict(zip(self.names, self._taken.tolist(), strict=True))

    def sample(self, index: int) -> tuple[int, int]:
        """Return the number of the domain and the place in it of sample ``index``, counted from the first step on.

        Raises:
            UserError: a domain has no text left for the sample's step.
        """
        step, place = divmod(index, self.batch)
        if step != self._read:
            self.advance(step)
            self._places = self._draw()
            self._read = step
        return self._places[place]

    def advance(self, step: int) -> None:
        """Count what all steps before ``step`` read."""
        if step < self.step:
            raise RuntimeError(f"Samples of step {step} are asked for behind those of step {self.step}.")
        while self.step < step:
            self._taken = self._taken + np.bincount(self._domains(), minlength=len(self.names))
            self.step += 1

    def change(self, step: int, shares: Mapping[str, float]) -> None:
        """Draw by other shares from ``step`` on."""
        if self._read >= step:
            raise RuntimeError(f"Samples of step {self._read} were read before its shares were known.")
        self.advance(step)
        self._shares = np.array([shares[name] for name in self.names])

    def state(self, step: int) -> dict[str, Any]:
        """Return what ``restore`` needs to go on with ``step``."""
        self.advance(step)
        return {"step": step, "shares": self.shares, "taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was made."""
        self.step, self._read = state["step"], -1
        self._shares = np.array([state["shares"][name] for name in self.names])
        self._taken = np.array([state["taken"][name] for name in self.names])

    def _domains(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        generator = np.random.default_rng([self.seed, self.step])
        return generator.choice(len(self.names), size=self.batch, p=self._shares)

    def _draw(self) -> list[tuple[int, int]]:
        domains, places, taken = self._domains(), [], self._taken.copy()
        for domain in domains.tolist():
            places.append((domain, int(taken[domain])))
            taken[domain] += 1
        for name, size, wanted in zip(self.names, self._sizes, taken, strict=True):
            if wanted > size:
                raise UserError(
                    f"Domain {name} ends before step {self.step + 1}: it has {size:,} sequences, and {wanted:,} are "
                    "wanted; give it more text, or train on fewer tokens."
                )
        return places
