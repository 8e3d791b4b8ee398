"""Seconds that parts of a model, or whole models, take on this machine: modules of ``transformers``, random weights.

A part is timed on a stack of copies with weights and keys and values of their own, which together exceed the
processor's last-level cache several times. One copy would stay in that cache and look several times faster than it is
in a model, which reads all its weights from memory for every token.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import nn
from transformers import DynamicCache

from nemo_pvs.errors import UserError
from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.system import host_memory

InferencePhase = Literal["decode", "first token"]
"""``decode`` is one token after ``context`` others; ``first token`` is the ``context`` tokens and the next one."""

_CACHES = 4  # copies of a part are this many times as large as the last-level cache
_MOST_COPIES = 64  # of small parts, with which a whole model is not much larger than the cache either
_UNKNOWN_CACHE = 64 << 20
_RUNS, _LONG_ENOUGH = 30, 2.0
"""A median is taken over this many runs, or over those that fit into this many seconds."""


class TimedPart(NamedTuple):
    """A part of a model that takes the same time wherever its sizes are these."""

    kind: Literal["attention", "mlp", "head"]
    """``attention`` and ``mlp`` include their norm and residual; ``head`` is the model without its layers."""
    hidden: int
    heads: int = 0
    kv_groups: int = 0
    ffn: int = 0
    vocab: int = 0

    def __str__(self) -> str:
        """Return the kind and the sizes that it has, which is the part's key in a table."""
        sizes = {name: size for name, size in self._asdict().items() if name != "kind" and size}
        return f"{self.kind} " + ",".join(f"{name}={size}" for name, size in sizes.items())


def parts_of(shape: Shape) -> Iterator[tuple[TimedPart, int]]:
    """Yield the parts of a model with even layers, each with how often it occurs."""
    yield TimedPart("attention", shape.hidden, heads=shape.heads, kv_groups=shape.kv_groups), shape.layers
    yield TimedPart("mlp", shape.hidden, ffn=shape.ffn), shape.layers
    yield TimedPart("head", shape.hidden, vocab=shape.vocab), 1


@dataclass(frozen=True)
class Workload:
    """What is timed: a parent's family in a precision, decoding several sequences at once on a device."""

    config: Mapping[str, Any]
    """The parent's ``config.json``."""
    device: str
    """``cpu`` or ``cuda``."""
    dtype: torch.dtype
    batch: int
    """Sequences."""
    context: int
    """Tokens in each sequence, whose keys and values are cached."""

    def __post_init__(self) -> None:
        if min(self.batch, self.context) < 1:
            raise UserError("A latency needs a batch and a context of 1 or more.")
        config = model_class(self.config).config_class.from_dict(dict(self.config))
        for limit in ("max_position_embeddings", "sliding_window"):  # the next token has to fit, too
            longest = getattr(config, limit, None)
            if longest is not None and self.context >= longest:
                raise UserError(
                    f"A latency after {self.context} tokens cannot be measured for this model, whose {limit} is "
                    f"{longest}; choose a smaller --context."
                )

    @property
    def machine(self) -> dict[str, Any]:
        """What the times depend on besides the workload: processor, threads, libraries."""
        libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
        if self.device == "cuda":
            return {"device": torch.cuda.get_device_name(), "processor": _processor(), **libraries}
        return {"device": _processor(), "threads": torch.get_num_threads(), **libraries}

    def describe(self) -> dict[str, Any]:
        """Return the workload as plain data: what two models have in common if a part takes equally long in both."""
        layout = Layout.for_config(self.config)
        shape = layout.shape(self.config)
        return {
            "architecture": layout.even_class[0],
            "head_dim": shape.head_dim,
            "features": list(shape.features),
            "on": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "context": self.context,
        }


class Timer:
    """Times parts and whole models for one workload."""

    def __init__(self, workload: Workload, clock: Callable[[], float] = time.perf_counter) -> None:
        """Prepare for a workload.

        Args:
            workload: What is timed.
            clock: Returns seconds; ``time.process_time`` leaves out the time of other processes, for one thread.
        """
        self.workload = workload
        self._clock = clock
        self._device = torch.device(workload.device)
        self._layout = Layout.for_config(workload.config)
        self._parent = self._layout.shape(workload.config)
        # No sequence reaches beyond the window, so there is none; the layers are then alike.
        windows = ("layer_types", "use_sliding_window", "sliding_window")
        self._config = {name: value for name, value in workload.config.items() if name not in windows}
        self._config["sliding_window"] = None

    @torch.no_grad()
    def part(self, phase: InferencePhase, part: TimedPart) -> float:
        """Return the median seconds that a part takes.

        Raises:
            UserError: its copies do not fit in memory.
        """
        copies = min(_MOST_COPIES, math.ceil(_CACHES * last_level_cache(self._device) / self._bytes(part)))
        if copies * self._bytes(part) > self._free_bytes():
            raise UserError(
                f"Measuring {part} needs {copies * self._bytes(part) / 1e9:.1f} GB, more than is free here; choose a "
                "smaller --batch or --context."
            )
        sizes = {name: size for name, size in part._asdict().items() if name != "kind" and size}
        shape = self._parent.replace(**{**sizes, "layers": 1 if part.kind == "head" else copies})
        if part.kind == "attention":
            run = self._attention(phase, shape)
        elif part.kind == "mlp":
            run = self._mlp(phase, shape)
        else:
            run = self._models(phase, shape, copies, without_layers=True)
        return self._median_seconds(run) / copies

    @torch.no_grad()
    def whole(self, phase: InferencePhase, shape: Shape) -> float:
        """Return the median seconds that a whole model with random weights takes.

        Its forward pass and the choice of the most likely token are timed, a tokenizer and a sampler are not.
        """
        return self._median_seconds(self._models(phase, shape, copies=1))

    def holds(self, shape: Shape) -> bool:
        """Whether a whole model fits in the memory that is free now, with a third of it left for activations."""
        cached = 2 * self.workload.batch * self.workload.context * shape.head_dim * shape.kv_groups * shape.layers
        return 1.5 * self.workload.dtype.itemsize * (shape.parameters + cached) < self._free_bytes()

    def _attention(self, phase: InferencePhase, shape: Shape) -> Callable[[], None]:
        model = self._skeleton(shape)
        for layer in model.model.layers:
            self._fill(layer.input_layernorm)
            self._fill(layer.self_attn)
        cache, states = self._cache(phase, model.config, shape), self._states(phase, shape)
        past = cache.get_seq_length()
        positions = torch.arange(past, past + states.shape[1], device=self._device)
        rotary = self._rotary(model)(states, positions[None])

        def run() -> None:
            hidden = states
            for layer in model.model.layers:
                attended, _ = layer.self_attn(
                    hidden_states=layer.input_layernorm(hidden),
                    attention_mask=None,
                    position_ids=positions[None],
                    past_key_values=cache,
                    use_cache=True,
                    cache_position=positions,
                    position_embeddings=rotary,
                )
                hidden = hidden + attended
            cache.crop(past)

        return run

    def _mlp(self, phase: InferencePhase, shape: Shape) -> Callable[[], None]:
        layers = self._skeleton(shape).model.layers
        for layer in layers:
            self._fill(layer.post_attention_layernorm)
            self._fill(layer.mlp)
        states = self._states(phase, shape)

        def run() -> None:
            hidden = states
            for layer in layers:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        return run

    def _models(
        self, phase: InferencePhase, shape: Shape, copies: int, without_layers: bool = False
    ) -> Callable[[], None]:
        models = [self._skeleton(shape) for _ in range(copies)]
        for model in models:
            if without_layers:
                model.model.layers = nn.ModuleList()
            self._fill(model)
            model.model.rotary_emb = self._rotary(model)
            model.tie_weights()
        cache = self._cache(phase, models[0].config, shape)
        past = cache.get_seq_length()
        tokens = torch.randint(shape.vocab, self._states(phase, shape).shape[:2], device=self._device)

        def run() -> None:
            for model in models:
                model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
                cache.crop(past)

        return run

    def _skeleton(self, shape: Shape) -> Any:
        """Build a model on the meta device, where it takes no memory."""
        config = self._layout.config(shape, self._config)
        with torch.device("meta"):
            class_ = model_class(config)
            settings = {"attn_implementation": "sdpa", "dtype": self.workload.dtype}
            return class_._from_config(class_.config_class.from_dict(config), **settings).eval()

    def _rotary(self, model: Any) -> Any:
        """Return a skeleton's rotary positions, whose buffers are no weights to be filled."""
        return type(model.model.rotary_emb)(config=model.config, device=self._device)

    def _fill(self, module: nn.Module) -> None:
        """Give a module memory and random weights; memory that was never written to might all be one page of zeros."""
        module.to_empty(device=self._device)
        for parameter in module.parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.uniform_(-0.05, 0.05)

    def _states(self, phase: InferencePhase, shape: Shape) -> torch.Tensor:
        """Return hidden states [batch, tokens of the phase, d]."""
        size = (self.workload.batch, 1 if phase == "decode" else self.workload.context, shape.hidden)
        return torch.randn(size, device=self._device, dtype=self.workload.dtype)

    def _cache(self, phase: InferencePhase, config: Any, shape: Shape) -> DynamicCache:
        """Return what ``generate`` caches keys and values in: those of the context, or nothing yet."""
        cache = DynamicCache(config=config)
        size = (self.workload.batch, shape.kv_groups, self.workload.context, shape.head_dim)
        for layer in range(shape.layers if phase == "decode" else 0):
            keys, values = (torch.randn(size, device=self._device, dtype=self.workload.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def _bytes(self, part: TimedPart) -> int:
        """Return the bytes that decoding reads in a part: weights, keys and values."""
        head_dim, cached = self._parent.head_dim, self.workload.batch * self.workload.context
        elements = {
            "attention": 2 * head_dim * (part.hidden * (part.heads + part.kv_groups) + cached * part.kv_groups),
            "mlp": 3 * part.hidden * part.ffn,
            "head": part.hidden * part.vocab,
        }
        return self.workload.dtype.itemsize * elements[part.kind]

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return host_memory.available()

    def _median_seconds(self, run: Callable[[], None]) -> float:
        times: list[float] = []
        self._seconds(run)  # the first run initialises kernels and memory
        while len(times) < _RUNS and sum(times) < _LONG_ENOUGH:
            times.append(self._seconds(run))
        return statistics.median(times)

    def _seconds(self, run: Callable[[], None]) -> float:
        begun = self._clock()
        run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock() - begun


def last_level_cache(device: torch.device, root: Path = Path("/")) -> int:
    """Return the bytes of the largest cache of a processor or GPU; 64 MiB if the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(_cache_sizes((root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")), default=_UNKNOWN_CACHE)


def _cache_sizes(files: Iterable[Path]) -> Iterator[int]:
    units = {"K": 1 << 10, "M": 1 << 20}
    for file in files:
        size = file.read_text().strip()
        yield int(size[:-1]) * units[size[-1]]


def _processor() -> str:
    """Return the model name of the CPU."""
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
