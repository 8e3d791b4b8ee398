"""Writes a model as the folder of a run that Megatron-Bridge and Megatron-LM load, tensor by tensor.

It looks like a run that has saved one checkpoint, ``iter_0000001``, without an optimizer. The weights are those of a
NeMo checkpoint without the prefix of NeMo's wrapper.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nemo_pvs.checkpoints.files.torch_dist import write_common, write_torch_dist
from nemo_pvs.checkpoints.manifest import Manifest, Recorder
from nemo_pvs.checkpoints.masks import FILE as MASKS
from nemo_pvs.checkpoints.masks import masks_of, write_masks
from nemo_pvs.checkpoints.megatron.arguments import arguments_of
from nemo_pvs.checkpoints.megatron.run_config import RUN_CONFIG, provider_fields, write_run_config
from nemo_pvs.checkpoints.megatron.source import PREFIX
from nemo_pvs.checkpoints.nemo.checkpoint import extra_states, weight_blocks
from nemo_pvs.checkpoints.nemo.context import HUGGINGFACE_CONFIG
from nemo_pvs.checkpoints.source import Progress, WeightSource
from nemo_pvs.checkpoints.tensor_record import dtype_name
from nemo_pvs.checkpoints.transforms.biases import with_both_biases
from nemo_pvs.data.assets import copy_asset, tokenizer_among
from nemo_pvs.model.megatron_run import TRACKER, iteration_folder
from nemo_pvs.system.files import whole_folder, write_json

_ITERATION = 1
"""Megatron-LM before 0.16 refuses 0."""
_TOKENIZER = "tokenizer"
_TRAIN_STATE = "train_state.pt"


def write_megatron(
    source: WeightSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    before_rename: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write a model as a checkpoint of Megatron-Bridge and Megatron-LM, which load it at any parallelism.

    Where only the attention or only the MLP has biases, zeros are added for the other (``with_both_biases``). Layers
    with different KV groups or FFN widths become a heterogeneous model, which only Bridge loads.

    Args:
        source: The model.
        target: The folder to make; Bridge's ``run_config.yaml`` states its absolute path.
        dtype: Cast every tensor to this dtype; None keeps the stored dtypes.
        allow_nonfinite: Write NaN and infinite values instead of refusing the tensors that have them.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.
        before_rename: Called with the temporary folder that is about to become ``target``; what it writes there
            appears together with the model, and an error removes everything.

    Returns:
        The manifest, which is also in the folder of the iteration.

    Raises:
        UserError: ``target`` exists or cannot be written, Megatron cannot express the model, or the source is broken.
    """
    recorder = Recorder(with_both_biases(source), dtype, progress, allow_nonfinite=allow_nonfinite)
    shape, layout = recorder.shape, recorder.layout
    layout.require_class(shape)
    first = recorder.dtype_of(next(iter(recorder.parts)))
    fields = provider_fields({**layout.config(shape, recorder.source.config), "torch_dtype": dtype_name(first)})
    arguments_of(fields, _ITERATION)  # both refuse what Megatron cannot express before anything is written
    blocks = (replace(block, name=block.name.removeprefix(PREFIX)) for block in weight_blocks(recorder, shape.vocab))
    states = [name.removeprefix(PREFIX) for name in extra_states(layout, shape)]
    with whole_folder(Path(target), overwrite=overwrite) as folder:
        iteration = folder / iteration_folder(_ITERATION)
        write_torch_dist(iteration, blocks, states)
        config = recorder.config()
        fields = provider_fields(config)
        write_common(iteration, checkpoint_version=3.0, iteration=_ITERATION, args=arguments_of(fields, _ITERATION))
        for asset in source.assets:
            copy_asset(asset, iteration / _TOKENIZER)
        tokenizer = Path(target).resolve() / iteration.name / _TOKENIZER if tokenizer_among(source.assets) else None
        write_run_config(iteration / RUN_CONFIG, fields, tokenizer)
        write_json(iteration / HUGGINGFACE_CONFIG, config)
        if masks_of(source).names:
            write_masks(masks_of(source), iteration / MASKS)
        torch.save(_train_state(), iteration / _TRAIN_STATE)
        shutil.copyfile(iteration / _TRAIN_STATE, folder / f"latest_{_TRAIN_STATE}")
        (folder / TRACKER).write_text(str(_ITERATION))
        manifest = recorder.finish(iteration, "megatron")
        if before_rename:
            before_rename(folder)
        return manifest


def _train_state() -> dict[str, torch.Tensor]:
    """Return the state of Bridge's training loop: nothing has been read."""
    counters = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return {
        "step": torch.tensor(_ITERATION, dtype=torch.int32),
        **{name: torch.tensor(0, dtype=torch.int32) for name in counters},
        "floating_point_operations_so_far": torch.tensor(0.0),
        **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
    }
