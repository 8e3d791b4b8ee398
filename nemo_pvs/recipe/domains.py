"""The block ``dynamic_loading``: the shares of the domains in a batch, which follow their losses (Sheared LLaMA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Fraction, RecipeBlock

DomainShare = Annotated[float, Field(gt=0, le=1)]
Loss = Annotated[float, Field(gt=0)]


class ReferenceModel(RecipeBlock):
    """A model of the parent's family and its loss on each domain."""

    parameters: float = Field(gt=0)
    losses: dict[str, Loss]
    """Nats per token, by domain."""


class DynamicLoading(RecipeBlock):
    """Dynamic batch loading (Xia et al., 2310.06694, section 2.2): each validation raises the shares that lag.

    Defaults are those of the published runs.
    """

    kind: Literal["doremi", "constant"] = "doremi"
    """``doremi``: shares follow the losses (``update_proportions``); ``constant``: they stay as they are."""
    proportions: dict[str, DomainShare] | None = None
    """Initial shares, by domain; by default pruned arms continue with the final shares of mask learning."""
    target_losses: dict[str, Loss] | None = None
    """Target loss of each domain, in nats per token."""
    fitted: list[ReferenceModel] | None = None
    """Alternatively, three or more models whose losses are extrapolated to the target's number of parameters
    (``reference_losses``)."""
    rate: float = Field(default=1.0, gt=0)
    smoothing: Fraction = 1e-4
    clip: bool = False
    """Count a domain that is ahead of its target as on target, as in the paper's algorithm 1."""

    @model_validator(mode="after")
    def _says_where_to(self) -> DynamicLoading:
        given = (self.target_losses is not None) + (self.fitted is not None)
        if given != (self.kind == "doremi"):
            raise ValueError(
                "shares follow losses towards targets: give either target_losses or fitted"
                if self.kind == "doremi"
                else "constant shares need no target_losses and nothing fitted; leave them out"
            )
        if self.fitted is not None and len({model.parameters for model in self.fitted}) < 3:
            raise ValueError("fitted needs three or more models of different sizes")
        if self.proportions is not None and abs(sum(self.proportions.values()) - 1) > 1e-3:
            raise ValueError(f"the proportions add up to {sum(self.proportions.values()):g}, not to 1")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """The proportions, normalised to add up to exactly 1; published ones are rounded to three digits."""
        proportions = self.proportions or {}
        return {name: share / sum(proportions.values()) for name, share in proportions.items()}

    def targets(self, domains: Sequence[str], parameters: float) -> list[float] | None:
        """Return the target losses in nats per token, in the order of ``domains``; None for constant shares.

        Args:
            domains: Names of the domains.
            parameters: Number of parameters of the model, for the extrapolation from ``fitted``.
        """
        if self.target_losses is not None:
            return [self.target_losses[name] for name in domains]
        if self.fitted is None:
            return None
        from nemo_pvs.data.dynamic_loading import reference_losses

        losses = [[model.losses[name] for name in domains] for model in self.fitted]
        return reference_losses([model.parameters for model in self.fitted], losses, parameters)

    def check_domains(self, domains: Iterable[str], where: str) -> None:
        """Refuse shares and losses whose domains are not those of the text.

        Args:
            domains: The text's domains.
            where: The key of this block, for messages.

        Raises:
            ValueError: a domain is missing or unknown.
        """
        blocks = {"proportions": self.proportions, "target_losses": self.target_losses}
        blocks |= {f"fitted.{number}.losses": model.losses for number, model in enumerate(self.fitted or [])}
        for key, given in blocks.items():
            if given is None:
                continue
            for name in sorted(set(domains) ^ set(given)):
                what = "is no domain of data" if name in given else "is missing"
                raise ValueError(f"{where}.{key}: {name} {what}, whose domains are {', '.join(domains)}")

    def check_enough(self, available: Mapping[str, int], tokens: int, known: int) -> None:
        """Refuse a training run for which a domain is certainly too short.

        Shares that follow losses are only known up to the first validation; a domain may still run out after it.

        Args:
            available: Tokens available in each domain.
            tokens: Tokens that the run reads.
            known: Tokens that it reads before the first validation.

        Raises:
            UserError: a domain, or all of them together, have too few tokens.
        """
        if tokens >= sum(available.values()):
            raise UserError(
                f"Training reads {tokens:,} tokens, but all domains together have {sum(available.values()):,}; take "
                "more text, or lower train.tokens or budgets."
            )
        for name, share in self.shares.items():
            wanted = int(share * (tokens if self.kind == "constant" else min(known, tokens)))
            if wanted >= available[name]:
                raise UserError(
                    f"Training reads about {wanted:,} tokens of domain {name} (share {share:g}), but it has "
                    f"{available[name]:,}; take more text, or lower its share, train.tokens or budgets."
                )
