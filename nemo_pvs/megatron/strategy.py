"""NeMo's strategy, with what a run needs of its checkpoints and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo import lightning as nl
from nemo.lightning.ckpt_utils import WEIGHTS_PATH

from nemo_pvs.checkpoints.huggingface.shards import few
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.adamw import stand_in_for_fused_adam
from nemo_pvs.megatron.optimizer_checkpoints import correct_optimizer_checkpoints
from nemo_pvs.training.checkpoints import check_split


class Strategy(nl.MegatronStrategy):
    """MegatronStrategy whose checkpoints can be saved and loaded with or without Transformer Engine and Apex.

    A weight that a checkpoint lacks is an error, whatever ``ckpt_load_strictness`` says about extra states.
    """

    def setup(self, trainer):
        """Correct Megatron's optimizer before NeMo builds it."""
        stand_in_for_fused_adam()
        correct_optimizer_checkpoints()
        super().setup(trainer)

    @property
    def split(self) -> dict[str, Any]:
        """How this run splits the model, as ``Parallelism.split``."""
        return {
            "tensor_parallel": self.tensor_model_parallel_size,
            "pipeline_parallel": self.pipeline_model_parallel_size,
            "virtual_pipeline": self.virtual_pipeline_model_parallel_size,
            "first_stage_layers": self.num_layers_in_first_pipeline_stage,
            "last_stage_layers": self.num_layers_in_last_pipeline_stage,
        }

    def load_checkpoint(self, checkpoint_path, selective_restore=False):
        """Load a checkpoint to resume from, or the initial weights.

        Raises:
            UserError: the checkpoint can only be resumed in another layout.
        """
        if not selective_restore:
            distributed = self.ddp_config.use_distributed_optimizer
            check_split(_folder(checkpoint_path), self.split, distributed_optimizer=distributed)
        return super().load_checkpoint(checkpoint_path, selective_restore)

    def load_model_state_dict(self, checkpoint, strict=True):
        """Load the model's weights.

        Raises:
            UserError: the checkpoint lacks a weight.
        """
        folder = _folder(self.trainer.ckpt_path or self.restore_config.path)
        _refuse_missing_weights(folder, self.megatron_parallel, checkpoint.get("state_dict", checkpoint))
        super().load_model_state_dict(checkpoint, strict)


def _refuse_missing_weights(folder: Path, chunks: Iterable[Any], loaded: Mapping[str, Any]) -> None:
    """Raise a UserError if a model chunk has a weight that was not loaded.

    With its lenient settings, NeMo only logs this and trains on with random numbers. A missing extra state (FP8
    scales) is not an error: checkpoints that were written without Transformer Engine lack some.

    Args:
        folder: The checkpoint, for the message.
        chunks: The model chunks of this rank: one, or several with a virtual pipeline.
        loaded: What was loaded: tensors by name, or one such mapping per chunk under ``model_<index>``.
    """
    for index, chunk in enumerate(chunks):
        present = {_plain(name) for name in loaded.get(f"model_{index}", loaded)}
        wanted = {_plain(name) for name in chunk.state_dict() if not name.endswith("_extra_state")}
        missing = sorted(wanted - present)
        if missing:
            raise UserError(
                f"{folder} lacks {few(missing)}, so the model would be trained with random numbers in their place; "
                "use a checkpoint of this model."
            )


def _folder(path: str | Path) -> Path:
    """Return the folder of a checkpoint; NeMo sometimes names its subfolder with the weights."""
    return Path(path).parent if Path(path).name == WEIGHTS_PATH else Path(path)


def _plain(name: str) -> str:
    """Return a weight's name without the prefixes of the modules that wrap the model."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
