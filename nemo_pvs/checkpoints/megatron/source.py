"""Reads checkpoints of Megatron-LM and Megatron-Bridge: a ``torch_dist`` folder that no NeMo context describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.config import normal_config, read_config, without_quantization
from nemo_pvs.checkpoints.masks import FILE as MASKS
from nemo_pvs.checkpoints.megatron.arguments import config_from_arguments
from nemo_pvs.checkpoints.megatron.run_config import RUN_CONFIG, read_run_config
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.nemo.context import HUGGINGFACE_CONFIG
from nemo_pvs.data.assets import asset_files, tokenizer_folder
from nemo_pvs.errors import UserError
from nemo_pvs.system.progress import say_once

PREFIX = "module."
"""What NeMo's wrapper adds to the names of the model's tensors, and Megatron itself does not."""

_MODELOPT = "modelopt_state"
_OPTIMIZER = ("optimizer.", "chained_")


class MegatronSource(NemoSource):
    """The ``iter_<n>`` folder of a Megatron-LM or Megatron-Bridge run, or the ``weights`` folder of a NeMo checkpoint.

    The first of these describes the model: the given config, ``config.json``, what ``write_megatron`` keeps, Bridge's
    ``run_config.yaml``, and the arguments that Megatron-LM stores in ``common.pt``.
    """

    format = "megatron"

    def __init__(self, folder: str | Path, config: str | Path | None = None) -> None:
        """Open a checkpoint; no weight is read yet.

        Args:
            folder: Contains ``.metadata`` and the data files.
            config: The model's Hugging Face ``config.json``, or the folder that contains it (and the tokenizer).

        Raises:
            UserError: it is not a torch_dist checkpoint of a Llama-family model, or its config does not fit it.
        """
        self._config_path = _config_path(Path(folder), config)
        self._config_given = config is not None
        super().__init__(folder)
        if (self.folder / _MODELOPT).is_dir():
            say_once(f"{self.folder} has a {_MODELOPT}, which is ignored; its weights are read as plain ones.")

    @property
    def assets(self) -> tuple[Path, ...]:
        """Tokenizer files and generation config: next to a given config, in ``tokenizer/``, or next to the weights."""
        if self._config_given and self._config_path is not None:
            return asset_files(self._config_path.parent)
        return asset_files(tokenizer_folder(self.folder))

    @property
    def _masks_path(self) -> Path:
        return self.folder / MASKS

    def _open_weights(self) -> TorchDistReader:
        return _Prefixed(self.folder)

    def _read_config(self, *, vocab_rows: int, dtype: str) -> Mapping[str, Any]:
        if self._config_path is not None:
            return without_quantization(read_config(self._config_path), self._config_path)
        run_config, common = self.folder / RUN_CONFIG, self.folder / "common.pt"
        if run_config.is_file():
            return read_run_config(run_config, vocab_rows=vocab_rows, dtype=dtype)
        return normal_config(config_from_arguments(common, vocab_rows=vocab_rows, dtype=dtype), common)


class _Prefixed(TorchDistReader):
    """Adds the prefix of NeMo's wrapper to the names of the model's tensors if they lack it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._added = "" if any(name.startswith(PREFIX) for name in super().names) else PREFIX

    @property
    def names(self) -> list[str]:
        return [name if name.startswith(_OPTIMIZER) else self._added + name for name in super().names]

    def size(self, name: str) -> tuple[int, ...]:
        return super().size(name.removeprefix(self._added))

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(name.removeprefix(self._added))

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        return super().read(name.removeprefix(self._added), offset, size)


def _config_path(folder: Path, config: str | Path | None) -> Path | None:
    if config is None:
        kept = (folder / "config.json", folder / HUGGINGFACE_CONFIG)
        return next((path for path in kept if path.is_file()), None)
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise UserError(f"There is no config {path}; give a config.json or the folder that contains one.")
    return path
