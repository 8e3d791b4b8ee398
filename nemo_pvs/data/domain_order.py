"""The order of training samples from several domains whose shares change during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nemo_pvs.errors import UserError


class DomainOrder:
    """An order over the samples of several domains, each read sequentially and never repeated.

    The domain of every sample of a batch is drawn by the shares, as in the published code of Sheared LLaMA (arXiv
    2310.06694), so a batch has each domain's share in expectation. The draw depends only on the seed, the step and the
    shares, and the position within a domain only on earlier draws, so every rank of every layout computes the same
    batches. Within a domain, samples keep the domain's order.
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
        """Start at step 0.

        Args:
            sizes: Number of samples of each domain; the order of the keys is that of the domains.
            shares: Initial shares of the domains.
            taken: Number of samples of each domain that were read before.
            batch: Samples per step.
            seed: Seed of the draws.
        """
        self.names = list(sizes)
        self.step = 0
        self.batch = batch
        self.seed = seed
        self._sizes = np.array([sizes[name] for name in self.names])
        self._shares = np.array([shares[name] for name in self.names])
        self._taken = np.array([taken[name] for name in self.names])
        self._read = -1
        self._positions: list[tuple[int, int]] = []

    @property
    def shares(self) -> dict[str, float]:
        """Current shares of the domains."""
        return dict(zip(self.names, self._shares.tolist(), strict=True))

    @property
    def taken(self) -> dict[str, int]:
        """Samples of each domain read before ``step``."""
        return dict(zip(self.names, self._taken.tolist(), strict=True))

    def sample(self, index: int) -> tuple[int, int]:
        """Return the domain's number and the position in it of sample ``index``, counted from the first step.

        Raises:
            UserError: a domain has too few samples for the sample's step.
        """
        step, position = divmod(index, self.batch)
        if step != self._read:
            self.advance(step)
            self._positions = self._draw()
            self._read = step
        return self._positions[position]

    def advance(self, step: int) -> None:
        """Advance to ``step``, counting the samples of the steps before it."""
        if step < self.step:
            raise RuntimeError(f"Samples of step {step} were requested after those of step {self.step}.")
        while self.step < step:
            self._taken = self._taken + np.bincount(self._domains(), minlength=len(self.names))
            self.step += 1

    def change(self, step: int, shares: Mapping[str, float]) -> None:
        """Change the shares from ``step`` on."""
        if self._read >= step:
            raise RuntimeError(f"Samples of step {self._read} were drawn before its shares were known.")
        self.advance(step)
        self._shares = np.array([shares[name] for name in self.names])

    def state(self, step: int) -> dict[str, Any]:
        """Return the state with which ``restore`` continues at ``step``."""
        self.advance(step)
        return {"step": step, "shares": self.shares, "taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.step, self._read = state["step"], -1
        self._shares = np.array([state["shares"][name] for name in self.names])
        self._taken = np.array([state["taken"][name] for name in self.names])

    def _domains(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        generator = np.random.default_rng([self.seed, self.step])
        return generator.choice(len(self.names), size=self.batch, p=self._shares)

    def _draw(self) -> list[tuple[int, int]]:
        domains, positions, taken = self._domains(), [], self._taken.copy()
        for domain in domains.tolist():
            positions.append((domain, int(taken[domain])))
            taken[domain] += 1
        for name, size, wanted in zip(self.names, self._sizes, taken, strict=True):
            if wanted > size:
                raise UserError(
                    f"Domain {name} ends before step {self.step + 1}: it has {size:,} sequences, but {wanted:,} are "
                    "needed; give it more text, or train on fewer tokens."
                )
        return positions
