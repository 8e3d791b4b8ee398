"""How much a retrained model has regained of its parent, measured on plain text: no data set is needed.

Windows of a text are read by both models and their predictions compared at every position. Each window's beginning is
also a prompt, which both continue by greedy decoding. An end-of-text token does not stop them, because repetition and
distinct n-grams can only be compared at equal lengths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint, measure_once
from nemo_pvs.evaluation.degeneration import agreement, distinct, repetition
from nemo_pvs.evaluation.store import Store
from nemo_pvs.layerwise.divergence import Reference, buckets, divergence
from nemo_pvs.recipe.blocks import RecoveryMeasures
from nemo_pvs.system.files import sha256_json
from nemo_pvs.system.progress import progress

if TYPE_CHECKING:
    from nemo_pvs.evaluation.language_model import CheckpointLM

RecoveryMetrics = dict[str, dict[str, Any]]
PREFIX = "recovery"
"""Of the names of measurements, which end in that of the text."""
_NGRAM = 4
_DISTINCT = (1, 2)


@dataclass(frozen=True)
class RecoveryMeasure:
    """Takes the measures of models, against one parent or none."""

    sizes: RecoveryMeasures
    parent: OpenedCheckpoint | None
    """What is compared with; without it only repetition and distinct n-grams are measured."""
    store: Store
    engine: Engine
    limit: int | None = None
    """Maximum number of windows, if smaller than that of the sizes."""
    force: bool = False
    """Measure again even if the store has the result."""
    _continued: dict[str, list[list[int]]] = field(default_factory=dict)
    """The parent's continuations, by the hash of the prompts."""

    def not_compared(self, model: OpenedCheckpoint) -> str | None:
        """Return why a model cannot be compared with the parent; None if it can."""
        if self.parent is None:
            return "no parent to compare with (--parent)"
        if self.parent.tokenizer_sha256 != model.tokenizer_sha256 or self.parent.shape.vocab != model.shape.vocab:
            return f"its tokens are not those of {self.parent.path}"
        return None

    def check(self, model: OpenedCheckpoint, texts: dict[str, TokenSet]) -> None:
        """Check that the prompts fit the windows of each text, and windows and continuations a model's context.

        Raises:
            UserError: they do not.
        """
        prompt, new = self.sizes.prompt_tokens, self.sizes.new_tokens
        if prompt + new > model.context:
            raise UserError(
                f"A prompt of {prompt} tokens and {new} new ones do not fit the context of {model.path}, "
                f"{model.context} tokens; leave recovery out."
            )
        for text, tokens in texts.items():
            length = tokens.ids.shape[1]
            if prompt > length:
                raise UserError(
                    f"The windows of {text} have {length} tokens, and recovery takes prompts of {prompt} from them; "
                    "choose a longer sequence length."
                )
            if not self.not_compared(model):
                model.check_window(length)

    def continue_as_parent(self, texts: dict[str, TokenSet]) -> None:
        """Have the parent continue the prompts before other models do, so that one model at a time is in memory.

        Args:
            texts: Windows in the parent's tokens by name.
        """
        if self.parent is None:
            return
        with self.parent.language_model(self.engine) as load:
            for text, tokens in texts.items():
                name, ids = f"{PREFIX}/{text}", self._windows(tokens)
                self._continued[_hash(ids)] = self._continuations(self.parent, name, ids, load)

    def measure(
        self, model: OpenedCheckpoint, text: str, tokens: TokenSet, load: Callable[[], CheckpointLM]
    ) -> RecoveryMetrics:
        """Return a model's measures on one text, by metric.

        ``repetition``, ``distinct_1`` and ``distinct_2`` are of the continuations alone. ``agreement`` compares them
        with the parent's; ``kl`` and ``kl_FIRST_LAST``, by position, are KL(parent || model) in nats.

        Args:
            model: The model.
            text: Name of the text.
            tokens: Its windows, in the model's tokens.
            load: Returns the language model; called only if prompts have to be continued.
        """
        name, ids = f"{PREFIX}/{text}", self._windows(tokens)
        continuations = self._continuations(model, name, ids, load)
        size: dict[str, Any] = {"documents": len(ids), "tokens": sum(map(len, continuations))}
        size["windows"] = f"{self.sizes.new_tokens} after prompts of {self.sizes.prompt_tokens}"
        metrics = {
            "repetition": {**_mean([repetition(one, _NGRAM) for one in continuations]), "higher_is_better": False}
        }
        for n in _DISTINCT:
            value = distinct(continuations, n)
            metrics[f"distinct_{n}"] = {"value": value, "stderr": None, "higher_is_better": True}
        if self.parent is None or self.not_compared(model):
            return self._stored(model, name, ids, None, lambda: _with(metrics, size))
        parents = self._continued[_hash(ids)]
        shares = [agreement(one, parent) for one, parent in zip(continuations, parents, strict=True)]
        metrics["agreement"] = {**_mean(shares), "higher_is_better": True}
        found = self._stored(model, name, ids, self.parent, lambda: _with(metrics, size))
        return {**found, **self._divergence(model, name, ids)}

    def _divergence(self, model: OpenedCheckpoint, name: str, ids: torch.Tensor) -> RecoveryMetrics:
        assert self.parent is not None
        itself = model.fingerprint == self.parent.fingerprint

        def measure() -> RecoveryMetrics:
            found = torch.zeros(ids.shape)
            if not itself:
                with progress(f"{name} of {model.path}", "layers") as show:
                    found = divergence(model.source, self._reference, ids, self.engine.compute, progress=show)
            metrics = {"kl": _mean(found.mean(1).tolist())}
            for first, last in buckets(ids.shape[1]):
                metrics[f"kl_{first}_{last}"] = _mean(found[:, first - 1 : last].mean(1).tolist())
            size = {"documents": len(ids), "tokens": ids.numel(), "windows": f"chunks of {ids.shape[1]}"}
            return _with(metrics, {"higher_is_better": False, **size})

        settings = {**self._settings(model, ids, self.parent), "measure": "divergence"}
        return measure_once(self.store, name, settings, measure, force=self.force)

    @cached_property
    def _reference(self) -> Reference:
        assert self.parent is not None
        return Reference(self.parent.source, self.engine.compute)

    def _continuations(
        self, model: OpenedCheckpoint, name: str, ids: torch.Tensor, load: Callable[[], CheckpointLM]
    ) -> list[list[int]]:
        """Return a model's greedy continuations of the windows' prompts; earlier ones are read from the store."""
        prompts = ids[:, : self.sizes.prompt_tokens].tolist()

        def generate() -> RecoveryMetrics:
            with progress(f"continuations by {model.path}", "prompts"):
                return {"continuations": {"ids": load().greedy(prompts, self.sizes.new_tokens, ends=())}}

        settings = {
            **self._settings(model, ids[:, : self.sizes.prompt_tokens], None),
            "measure": "continuations",
            "new_tokens": self.sizes.new_tokens,
        }
        found = measure_once(self.store, name, settings, generate, force=self.force)
        continuations: list[list[int]] = found["continuations"]["ids"]
        return continuations

    def _stored(
        self,
        model: OpenedCheckpoint,
        name: str,
        ids: torch.Tensor,
        parent: OpenedCheckpoint | None,
        measure: Callable[[], RecoveryMetrics],
    ) -> RecoveryMetrics:
        settings = {**self._settings(model, ids, parent), "measure": "text", **self.sizes.model_dump()}
        return measure_once(self.store, name, settings, measure, force=self.force)

    def _settings(self, model: OpenedCheckpoint, ids: torch.Tensor, parent: OpenedCheckpoint | None) -> dict[str, Any]:
        """Return what every number depends on; the report pairs answers with equal ``task`` and ``limit``."""
        return {
            "model": model.fingerprint,
            "parent": parent and parent.fingerprint,
            "task": _hash(ids),
            "limit": self.limit,
            "backend": model.backend,
            "dtype": str(self.engine.compute.dtype),
        }

    def _windows(self, tokens: TokenSet) -> torch.Tensor:
        """Return the windows to read [N, S]."""
        return tokens.ids[: min(self.sizes.windows, self.limit or self.sizes.windows)]


def _hash(ids: torch.Tensor) -> str:
    return sha256_json(ids.tolist())


def _with(metrics: RecoveryMetrics, about: dict[str, Any]) -> RecoveryMetrics:
    return {name: {**values, **about} for name, values in metrics.items()}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over windows, its standard error and the values, for a comparison window by window."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"value": statistics.fmean(values), "stderr": error, "by_document": list(values)}
