"""A checkpoint under evaluation: its properties, and how to measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedTokenizerBase

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.token_bytes import token_bytes
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.scoring import TokenScorer, TransformersScorer
from nemo_pvs.evaluation.store import Store
from nemo_pvs.layerwise.model import ON_CPU, Compute, check_length
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.system import ranks
from nemo_pvs.system.files import read_json
from nemo_pvs.system.megatron_import import import_megatron
from nemo_pvs.system.ranks import from_main

if TYPE_CHECKING:
    from nemo_pvs.evaluation.language_model import CheckpointLM
    from nemo_pvs.evaluation.tasks import LoadedTask

Backend = Literal["transformers", "megatron"]
ShowProgress = Callable[..., None]


@dataclass(frozen=True)
class Engine:
    """Hardware, precision and parallelism with which a model runs."""

    compute: Compute = ON_CPU
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    batch_size: int | None = None
    """Sequences per batch of requests; None chooses by the available memory."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, for ``results.json``."""
        return {
            "device": self.compute.device,
            "dtype": str(self.compute.dtype),
            "memory_limit": self.compute.memory_limit,
            "tensor_parallel": self.tensor_parallel,
            "pipeline_parallel": self.pipeline_parallel,
            "batch_size": self.batch_size,
        }

    def check_ranks(self) -> None:
        """Check that the ranks hold a whole number of copies of a model.

        Raises:
            UserError: their number is not a multiple of TP x PP.
        """
        parts = self.tensor_parallel * self.pipeline_parallel
        if parts < 1 or ranks.world_size() % parts:
            raise UserError(
                f"Tensor parallelism {self.tensor_parallel} and pipeline parallelism {self.pipeline_parallel} need a "
                f"multiple of {parts} ranks, not {ranks.world_size()}; start them with torchrun --nproc-per-node "
                f"{max(parts, 1)} -m nemo_pvs.cli evaluate ..."
            )


class OpenedCheckpoint:
    """A checkpoint of any format, opened but not loaded yet."""

    def __init__(self, path: str, backend: Backend | None = None, folder: Path | None = None) -> None:
        """Open a checkpoint.

        Args:
            path: What it is called in reports: its folder, or what a user named instead, such as a GGUF file.
            backend: What runs the model; by default Megatron for NeMo checkpoints and ``transformers`` for all others.
            folder: Its folder, if that is not its path.

        Raises:
            UserError: the folder is not a checkpoint, or has no tokenizer.
        """
        self.path = path
        self.folder = folder or Path(path)
        self.source: WeightSource = open_source(self.folder)
        self.backend: Backend = backend or ("megatron" if isinstance(self.source, NemoSource) else "transformers")
        self.shape = shape_of(self.source)
        self.tokenizer_sha256 = tokenizer_hash(tokenizer_folder(self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the model, the same in every format."""
        return fingerprint(self.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(tokenizer_folder(self.folder))

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text (``ends_of``)."""
        return ends_of(self.source, self.tokenizer)

    @property
    def context(self) -> int:
        """Maximum number of tokens that the model reads."""
        return int(self.source.config["max_position_embeddings"])

    def check_window(self, length: int) -> None:
        """Check that the model reads ``length`` tokens, layer by layer.

        Raises:
            UserError: it does not.
        """
        check_length(model_class(self.source.config).config_class.from_dict(dict(self.source.config)), length)

    def check_answers(self, tasks: Sequence[LoadedTask]) -> None:
        """Check that what tasks ask the model to write fits its context.

        Raises:
            UserError: it does not; the message names the task.
        """
        for task in tasks:
            new = task.generation.max_new_tokens if task.generation else 0
            if new >= self.context:
                raise UserError(
                    f"The task {task.name} asks for up to {new} new tokens, which do not fit the context of "
                    f"{self.path}, {self.context} tokens; leave that task out."
                )

    def about(self) -> dict[str, Any]:
        """Return the fields that identify the model in reports."""
        return {
            "checkpoint": self.path,
            "fingerprint": self.fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "parameters": self.shape.parameters,
        }

    def measure_text(
        self, name: str, tokens: TokenSet, store: Store, engine: Engine, progress: ShowProgress, *, force: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Return loss, perplexity and bits per byte on a text's windows.

        The model is run layer by layer, so it need not fit into memory.

        Args:
            name: Name of the measurement.
            tokens: The windows.
            store: Earlier measurements, which are reused.
            engine: What runs the model.
            progress: Called with (layers done, layers in all).
            force: Measure again even if the store has the result.

        Returns:
            For ``loss`` (nats per token), ``perplexity`` and, where tokens are pieces of text, ``bits_per_byte``: the
            value, its standard error and what was measured.
        """
        settings = {
            "model": self.fingerprint,
            "tokens": {key: value for key, value in tokens.manifest.items() if key != "data_set"},
            "dtype": str(engine.compute.dtype),
        }

        def measure() -> dict[str, dict[str, Any]]:
            result = perplexity(
                self.source,
                tokens,
                engine.compute,
                stride=tokens.manifest["stride"],
                token_bytes=token_bytes(tokenizer_folder(self.folder)),
                progress=progress,
            )
            size = {"documents": len(tokens.ids), "tokens": result["tokens"], "windows": tokens.manifest["cut"]}
            return {
                metric: {
                    "value": result[metric],
                    "stderr": result[f"{metric}_stderr"],
                    "higher_is_better": False,
                    **size,
                }
                for metric in ("loss", "perplexity", "bits_per_byte")
                if metric in result
            }

        return measure_once(store, name, settings, measure, force=force)

    def measure_task(
        self,
        task: LoadedTask,
        store: Store,
        engine: Engine,
        model: Callable[[], CheckpointLM],
        progress: ShowProgress,
        *,
        limit: int | None = None,
        force: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Return a task's metrics.

        Args:
            task: The task.
            store: Earlier measurements, which are reused, and journals of unfinished ones.
            engine: What runs the model.
            model: Returns the language model; called only if the task has to be measured.
            progress: Called with (requests done, requests in all).
            limit: Maximum number of documents.
            force: Measure again even if the store has the result.

        Returns:
            The metrics by name, as ``tasks.measure_task`` returns them.
        """
        from nemo_pvs.evaluation.tasks import measure_task

        settings: dict[str, Any] = {
            "model": self.fingerprint,
            "tokenizer": self.tokenizer_sha256,
            "task": task.content_hash,
            "metric": task.request.metric,
            "limit": limit,
            "backend": self.backend,
            "dtype": str(engine.compute.dtype),
            "context": self.context,
        }
        if task.task.OUTPUT_TYPE == "generate_until":
            settings["ends"] = sorted(self.ends)

        def measure() -> dict[str, dict[str, Any]]:
            language_model = model()
            language_model.progress = progress
            language_model.journal = store.journal(task.name, settings)
            if force and ranks.is_main():
                language_model.journal.remove()
            return measure_task(task, language_model, limit)

        return measure_once(store, task.name, settings, measure, force=force)

    @contextmanager
    def language_model(self, engine: Engine) -> Iterator[Callable[[], CheckpointLM]]:
        """Yield a function that loads the model on its first call and returns it; the block's end frees the model."""
        from nemo_pvs.evaluation.language_model import CheckpointLM

        loaded: list[CheckpointLM] = []
        running: list[AbstractContextManager[TokenScorer]] = []

        def load() -> CheckpointLM:
            if not loaded:
                running.append(self._scorer(engine))
                scorer = running[0].__enter__()
                settings: dict[str, Any] = {"ends": self.ends, "batch_size": engine.batch_size}
                loaded.append(CheckpointLM(scorer, self.tokenizer, self.context, **settings))
            return loaded[0]

        try:
            yield load
        finally:
            loaded.clear()
            for context in running:
                context.__exit__(None, None, None)

    @contextmanager
    def _scorer(self, engine: Engine) -> Iterator[TokenScorer]:
        options: dict[str, Any] = {"dtype": engine.compute.dtype, "device": engine.compute.device}
        if self.backend == "transformers":
            yield TransformersScorer(self.source, **options, rank=ranks.rank(), ranks=ranks.world_size())
            return
        import_megatron()
        from nemo_pvs.megatron.inference import MegatronScorer, megatron_ranks

        with megatron_ranks(engine.tensor_parallel, engine.pipeline_parallel, device=engine.compute.device):
            yield MegatronScorer(self.source, **options)


def ends_of(source: WeightSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and the generation config's, or else the config's."""
    named = source.config.get("eos_token_id")
    for asset in source.assets:
        if asset.name == "generation_config.json":
            named = read_json(asset).get("eos_token_id")
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return frozenset(ends - {None})


def measure_once(
    store: Store,
    name: str,
    settings: dict[str, Any],
    measure: Callable[[], dict[str, dict[str, Any]]],
    *,
    force: bool,
) -> dict[str, dict[str, Any]]:
    """Return an earlier measurement with the same settings, or measure and store the result."""
    known = None if force else from_main(lambda: store.find(name, settings))
    if known is not None:
        return {metric: {**result, "measured": "before"} for metric, result in known.items()}
    metrics = measure()
    if ranks.is_main():
        store.write(name, settings, metrics)
    return metrics
