"""Taylor importance of a model on Megatron's ranks: the whole model in memory, sharded by TP x PP, data split by DP.

Gives the same numbers as ``calibration.gradients``, which needs less memory and reads the model from disk; this is for
a model that is trained on many GPUs anyway. Pipeline stages run one after another, on one sequence at a time, because
the squared gradient of each sequence is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import distributed

from nemo_pvs.calibration.taylor import METRICS, Matrix, unit_scores
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.inference import MegatronScorer
from nemo_pvs.model.layout import Entry, Layout
from nemo_pvs.system import ranks


def megatron_taylor_scores(
    source: WeightSource,
    tokens: TokenSet,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the Taylor importance of all units (``calibration.taylor``); call inside ``inference.megatron_ranks``.

    Gradients are summed over the copies of the model (DP) before absolute values are taken. All weights of a KV group,
    query head or FFN channel are on one tensor rank and one pipeline stage, so the scores need no sum over TP or PP.

    Args:
        source: The dense model, of any format.
        tokens: The calibration text, split over the copies of the model.
        dtype: Type of weights and arithmetic; gradients are summed in at least fp32.
        device: ``cpu`` or ``cuda:<n>``.
        progress: Called with (sequences done, sequences in all) for this copy.

    Returns:
        ``groups.<metric>`` [L, G], ``heads.<metric>`` [L, H] and ``ffn.<metric>`` [L, f] for each of
        ``taylor.METRICS``, float64, on every rank.

    Raises:
        UserError: the model cannot be sharded this way, there are fewer sequences than copies, or gradients are not
            finite.
    """
    model = _MegatronGradients(source, dtype=dtype, device=device)
    samples = len(tokens.ids)
    if samples < model.replicas:
        raise UserError(
            f"{samples} calibration sequences cannot be split over {model.replicas} copies of the model; use more."
        )
    share = tokens.ids.tensor_split(model.replicas)[model.replica]
    for done, sequence in enumerate(share, 1):
        model.add(sequence[None])
        if progress:
            progress(done, len(share))
    return model.scores(samples)


class _MegatronGradients(MegatronScorer):
    """A model on Megatron's ranks that accumulates the gradients of its layers' matrices, one sequence at a time."""

    def __init__(self, source: WeightSource, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(source, dtype=dtype, device=device)
        self._shape = shape_of(source)
        parameters = dict(self.model.named_parameters())
        local_layers = {layer.layer_number - 1: index for index, layer in enumerate(self.model.decoder.layers)}
        self._matrices: list[tuple[Entry, torch.nn.Parameter]] = [
            (entry, parameters[f"decoder.layers.{local_layers[entry.layer]}.{entry.megatron}"])
            for entry in Layout.for_config(source.config).entries(self._shape)
            if entry.layer in local_layers and len(entry.parts[0].axes) == 2
        ]
        wide = torch.promote_types(dtype, torch.float32)
        self._totals = [torch.zeros_like(parameter, dtype=wide) for _, parameter in self._matrices]
        self._squares = [torch.zeros_like(total) for total in self._totals]

    def add(self, ids: torch.Tensor) -> None:
        """Add the gradients of one sequence [1, S]."""
        self._forward_and_backward(ids.to(self.device, torch.int64))
        with torch.no_grad():
            for (_, parameter), total, square in zip(self._matrices, self._totals, self._squares, strict=True):
                gradient = parameter.grad.to(total.dtype)
                total += gradient
                square.addcmul_(gradient, gradient)
        self.model.zero_grad(set_to_none=True)

    def _forward_and_backward(self, ids: torch.Tensor) -> None:
        """Set the ``grad`` of this rank's parameters to the gradient of the mean loss of one sequence [1, S]."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)
        hidden = torch.empty(inputs.shape[1], 1, self._shape.hidden, dtype=self._dtype, device=self.device)
        if not self._first:
            previous_rank = parallel_state.get_pipeline_model_parallel_prev_rank()
            distributed.recv(hidden, previous_rank)
            self.model.set_input_tensor(hidden.requires_grad_())
        output = self.model(inputs, positions, None)
        if self._last:
            logits = output.to(torch.promote_types(self._dtype, torch.float32))
            columns = torch.arange(self.vocab, device=self.device) + self._tensor_rank * self.vocab
            logits = logits.masked_fill(columns >= self._vocab, -torch.inf)  # padding of the vocabulary
            vocab_parallel_cross_entropy(logits, targets).mean().backward()
        else:
            next_rank = parallel_state.get_pipeline_model_parallel_next_rank()
            distributed.send(output.detach().contiguous(), next_rank)
            gradient = torch.empty_like(output)
            distributed.recv(gradient, next_rank)
            output.backward(gradient)
        if not self._first:
            distributed.send(hidden.grad, previous_rank)

    @torch.no_grad()
    def scores(self, samples: int) -> dict[str, torch.Tensor]:
        """Return all scores on every rank.

        Args:
            samples: Number of sequences that all copies of the model have read together.

        Raises:
            UserError: a gradient is not finite.
        """
        for tensor in (*self._totals, *self._squares):
            distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
            tensor /= samples
        sizes = {"groups": self._shape.kv_groups, "heads": self._shape.heads, "ffn": self._shape.ffn}
        scores = {
            f"{site}.{metric}": torch.zeros(self._shape.layers, size, dtype=torch.float64)
            for site, size in sizes.items()
            for metric in METRICS
        }
        if self.replica == 0:  # all copies have the same sums
            for layer in sorted({entry.layer or 0 for entry, _ in self._matrices}):
                local_scores = unit_scores(
                    self._parts(layer),
                    self._shape.kv_groups // self._tensor_ranks,
                    self._shape.heads // self._tensor_ranks,
                )
                for name, units in local_scores.items():
                    start = self._tensor_rank * len(units)
                    scores[name][layer, start : start + len(units)] = units
        for name, tensor in scores.items():
            scores[name] = ranks.all_reduce(tensor)
            finite = tensor.isfinite().all(dim=1)
            if not bool(finite.all()):
                layer = self._shape.layers - 1 - int((~finite).flip(0).int().argmax())
                raise UserError(f"The gradients of layer {layer} are not finite; is the checkpoint damaged?")
        return scores

    def _parts(self, layer: int) -> Iterator[Matrix]:
        """Yield this rank's rows or columns of each matrix of a layer, with its Hugging Face axes."""
        local_shape = self._shape.replace(
            ffn=self._shape.ffn // self._tensor_ranks,
            kv_groups=self._shape.kv_groups // self._tensor_ranks,
        )
        for (entry, parameter), total, square in zip(self._matrices, self._totals, self._squares, strict=True):
            if entry.layer == layer:
                tensors = (entry.split(tensor, local_shape) for tensor in (parameter.to(total.dtype), total, square))
                for part, *sums in zip(entry.parts, *tensors, strict=True):
                    yield Matrix(part.axes, *sums)
