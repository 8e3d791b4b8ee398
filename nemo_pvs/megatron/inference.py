"""Inference on Megatron: NeMo's model at any TP x PP, with weights loaded from any WeightSource.

Weights are read by the safe readers of ``nemo_pvs.checkpoints`` and the model's configuration is written afresh, so
nothing that a stranger pickled or configured is executed, no optimizer state is read, and the source need not be a
NeMo checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiddle
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from nemo.lightning import io
from torch import distributed
from torch.nn import functional

from nemo_pvs.checkpoints.nemo.context import write_context
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.checkpoints.tensor_record import dtype_name
from nemo_pvs.checkpoints.transforms.biases import with_both_biases
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.token_scores import TokenScores, next_token_scores
from nemo_pvs.megatron.attention import FUSED_KERNELS, layer_spec
from nemo_pvs.megatron.cpu import megatron_on_cpu
from nemo_pvs.model.layout import Entry, Layout
from nemo_pvs.training.machine import has_transformer_engine

if TYPE_CHECKING:
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

# Transformer Engine fuses a norm into the linear layer that follows; in Megatron's local layers it is a module itself.
_LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@contextmanager
def megatron_ranks(
    tensor_parallel: int = 1, pipeline_parallel: int = 1, *, device: str | None = None
) -> Iterator[None]:
    """Initialise Megatron's parallel state inside the block, on the ranks of this job or on this process alone.

    Args:
        tensor_parallel: Ranks that share each matrix.
        pipeline_parallel: Ranks that share the layers. All further ranks hold copies of the model (DP).
        device: ``cpu`` or ``cuda:<n>``; the GPU if there is one. On ``cpu`` GPUs are hidden inside the block, so that
            models are built of layers that run there.
    """
    alone = not distributed.is_initialized()
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    with megatron_on_cpu(although_there_is_a_gpu=True) if on_cpu else nullcontext():
        if alone:
            distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        try:
            parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
            model_parallel_cuda_manual_seed(1)  # building a layer forks this generator even if nothing is initialised
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if alone:
                distributed.destroy_process_group()


class LoadedModel:
    """A model on Megatron's ranks, with its weights loaded; needs an initialised ``parallel_state``."""

    layer_spec: Callable[..., Any] | None = None
    """Layer spec of the model; by default NeMo's, or ours without Transformer Engine."""

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, device: str | torch.device, sequence_parallel: bool = False
    ) -> None:
        """Build this rank's part of the model and load its weights.

        Args:
            source: The checkpoint, of any format.
            dtype: Type of weights and arithmetic.
            device: ``cpu`` or ``cuda:<n>``.
            sequence_parallel: Shard activations outside the tensor parallel layers along the sequence.

        Raises:
            UserError: the model cannot be sharded this way, or NeMo does not support its family.
        """
        source = with_both_biases(source)
        self.device = torch.device(device)
        self._dtype = dtype
        self._tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        self._sequence_parallel = sequence_parallel
        self._tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self._first = parallel_state.is_pipeline_first_stage()
        self._last = parallel_state.is_pipeline_last_stage()
        self.replica = parallel_state.get_data_parallel_rank()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.speaks = self._last and self._tensor_rank == 0
        shape = self.shape = shape_of(source)
        self.vocab = -(-shape.vocab // self._tensor_ranks)
        self._vocab = shape.vocab
        shape.replace(vocab=self.vocab * self._tensor_ranks).check_parallel(
            tensor_parallel=self._tensor_ranks,
            pipeline_parallel=parallel_state.get_pipeline_model_parallel_world_size(),
        )
        self.model = self._build(source)
        self._load(source)
        attentions = [layer.self_attention for layer in self.model.decoder.layers]
        groups = sum(attention.num_query_groups_per_partition for attention in attentions)
        self.cache_bytes = 2 * groups * shape.head_dim * dtype.itemsize

    def forward(self, ids: torch.Tensor, cache: StaticInferenceContext | None = None) -> torch.Tensor | None:
        """Run all pipeline stages on token ids [N, S] and return the logits on the last one, elsewhere None.

        Args:
            ids: Token ids.
            cache: Keys and values of the tokens before; those of ``ids`` are added.

        Returns:
            This rank's columns of the logits [N, S, V / TP]; with a cache those of the last token [N, 1, V].
        """
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        if not self._first:
            states = ids.shape[1], ids.shape[0], self.model.config.hidden_size
            hidden = torch.empty(states, dtype=self._dtype, device=self.device)
            distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            self.model.set_input_tensor(hidden)
        options = {} if cache is None else {"inference_context": cache, "runtime_gather_output": True}
        output = self.model(ids, positions, None, **options)
        if not self._last:
            distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        return output if cache is None else output[..., : self._vocab]

    def _build(self, source: WeightSource) -> torch.nn.Module:
        """Build NeMo's model of this rank's layers, without weights."""
        hf_config = Layout.for_config(source.config).config(shape_of(source), source.config)  # every size explicit
        hf_config["torch_dtype"] = dtype_name(self._dtype)
        with tempfile.TemporaryDirectory() as folder:
            context = Path(folder, "context")
            write_context(context, hf_config, (), vocab_rows=self.vocab * self._tensor_ranks)
            config = io.load_context(context, subpath="model", build=False).config
        settings = {
            "params_dtype": self._dtype,
            "pipeline_dtype": self._dtype,
            "bf16": self._dtype == torch.bfloat16,
            "fp16": False,
            "tensor_model_parallel_size": self._tensor_ranks,
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "sequence_parallel": self._sequence_parallel,
            "perform_initialization": False,
            "parallel_output": True,  # each rank keeps its columns of the logits
            # NeMo's default with Apex; it adds gradients to main_grad, which weights have only in NeMo's training.
            "gradient_accumulation_fusion": False,
        }
        if not has_transformer_engine():
            settings.update(dict.fromkeys(FUSED_KERNELS, False))
            settings["transformer_layer_spec"] = layer_spec
            settings["use_cpu_initialization"] = self.device.type == "cpu"
        if self.layer_spec:
            settings["transformer_layer_spec"] = self.layer_spec
        for name, value in settings.items():
            setattr(config, name, value)
        model = fiddle.build(config).configure_model(None, pre_process=self._first, post_process=self._last)
        return model.to(self.device, self._dtype).eval()

    @torch.no_grad()
    def _load(self, source: WeightSource) -> None:
        """Fill every parameter of this rank from the source, as the family's weight table maps them."""
        unfilled = dict(self.model.named_parameters())
        layers = {layer.layer_number - 1: index for index, layer in enumerate(self.model.decoder.layers)}
        for entry in Layout.for_config(source.config).entries(shape_of(source)):
            if entry.layer is not None and entry.layer not in layers:
                continue
            prefix = "" if entry.layer is None else f"decoder.layers.{layers[entry.layer]}."
            names = [prefix + entry.megatron, prefix + _LOCAL_NORMS.get(entry.megatron, entry.megatron)]
            if entry.parts[0].name == "model.embed_tokens.weight" and shape_of(source).tied:
                names.append("output_layer.weight")  # the last pipeline stage's own copy
            parameters = [unfilled.pop(name) for name in dict.fromkeys(names) if name in unfilled]
            if parameters:
                shard = self._shard(entry, source)
                for parameter in parameters:
                    parameter.copy_(shard)
        assert not unfilled, f"no weights for {sorted(unfilled)}"

    def _shard(self, entry: Entry, source: WeightSource) -> torch.Tensor:
        """Return this rank's part of one Megatron tensor."""
        parts = [source.read(part.name) for part in entry.parts]
        shape, axis = shape_of(source), entry.tensor_parallel_axis
        if axis is None:
            return entry.join(parts, shape)
        if entry.fuse == "gate_up":
            return entry.join([part.chunk(self._tensor_ranks, axis)[self._tensor_rank] for part in parts], shape)
        whole = entry.join(parts, shape)
        if entry.parts[0].axes[0] == "vocab":
            whole = functional.pad(whole, (0, 0, 0, self.vocab * self._tensor_ranks - self._vocab))
        return whole.chunk(self._tensor_ranks, axis)[self._tensor_rank]


class MegatronScorer(LoadedModel):
    """A model on Megatron's ranks that scores texts; use it inside ``megatron_ranks``."""

    @torch.no_grad()
    def score(self, ids: torch.Tensor) -> TokenScores | None:
        """Score token ids [N, S]; return scores on tensor rank 0 of the last pipeline stage, elsewhere None."""
        ids = ids.to(self.device, torch.int64)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        output = self.forward(inputs)
        if output is None:
            return None
        first_column = self._tensor_rank * self.vocab
        scores = next_token_scores(
            output[..., : max(0, self._vocab - first_column)],
            targets,
            first_column=first_column,
            group=parallel_state.get_tensor_model_parallel_group() if self._tensor_ranks > 1 else None,
        )
        return scores if self.speaks else None

    def decoder(self, rows: int, length: int) -> MegatronDecoder:
        """Return a decoder for up to ``rows`` sequences of up to ``length`` tokens."""
        return MegatronDecoder(self, rows, length)


class MegatronDecoder:
    """Sequences of equal length that a model on Megatron's ranks continues token by token."""

    def __init__(self, model: LoadedModel, rows: int, length: int) -> None:
        """Make an empty cache.

        Args:
            model: The model.
            rows: Maximum number of sequences.
            length: Maximum number of tokens in each.

        Raises:
            UserError: the sequences may become longer than the model's attention window.
        """
        window = model.model.config.window_size
        if window is not None and length > window[0]:
            raise UserError(
                f"A prompt and its new tokens, up to {length}, do not fit the model's attention window of "
                f"{window[0]}, and longer ones cannot be generated on Megatron; use --backend transformers."
            )
        # Not above: imported before Megatron's layers, this makes them take Apex's rotary embedding, not TE's.
        from megatron.core.inference.contexts.static_context import StaticInferenceContext

        self._model = model
        self._cache = StaticInferenceContext(rows, length)

    @torch.no_grad()
    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Read token ids [N, S] after all earlier ones and return the most probable next tokens [N], on every rank.

        More than one token each can be read only at first.
        """
        ids = ids.to(self._model.device, torch.int64)
        logits = self._model.forward(ids, self._cache)
        self._cache.sequence_len_offset += ids.shape[1]
        self._cache.enable_decode_mode()
        best = torch.empty(len(ids), dtype=torch.int64, device=self._model.device)
        if logits is not None:
            best = logits[:, -1].float().argmax(-1)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            distributed.broadcast(best, last, group=parallel_state.get_pipeline_model_parallel_group())
        return best.cpu()

    def keep(self, rows: Sequence[int]) -> None:
        """Let sequence ``rows[i] >= i`` become sequence ``i`` and forget all others."""
        end = self._cache.sequence_len_offset
        for target, source in enumerate(rows):
            if source != target:
                for pair in self._cache.key_value_memory_dict.values():
                    for memory in pair:
                        memory[:end, target] = memory[:end, source]
