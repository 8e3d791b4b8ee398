"""Reads checkpoints of Megatron-LM itself: a bare ``torch_dist`` folder with a config from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.config import normal_config, read_config, without_quantization
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.nemo.megatron_args import config_from_arguments
from nemo_pvs.data.assets import asset_files
from nemo_pvs.errors import UserError

_PREFIX = "module."


class MegatronSource(NemoSource):
    """The ``iter_<n>`` folder of a Megatron-LM run, or the ``weights`` folder of a NeMo checkpoint."""

    def __init__(self, folder: str | Path, config: str | Path | None = None) -> None:
        """Open a checkpoint; no weight is read yet.

        Args:
            folder: Contains ``.metadata`` and the data files.
            config: The model's Hugging Face ``config.json``, or the folder that contains it (and the tokenizer). By
                default ``config.json`` in ``folder``, or else the arguments that Megatron-LM stores in ``common.pt``.

        Raises:
            UserError: it is not a torch_dist checkpoint of a Llama-family model, or its config does not fit it.
        """
        self._config_path = _config_path(Path(folder), config)
        super().__init__(folder)

    @property
    def assets(self) -> tuple[Path, ...]:
        """Tokenizer files and generation config next to the config, or else next to the weights."""
        return asset_files(self._config_path.parent if self._config_path else self.folder)

    def _open_weights(self) -> TorchDistReader:
        reader = TorchDistReader(self.folder)
        return reader if any(name.startswith(_PREFIX) for name in reader.names) else _Prefixed(reader)

    def _read_config(self, *, vocab_rows: int, dtype: str) -> Mapping[str, Any]:
        if self._config_path is None:
            common = self.folder / "common.pt"
            return normal_config(config_from_arguments(common, vocab_rows=vocab_rows, dtype=dtype), common)
        return without_quantization(read_config(self._config_path), self._config_path)


class _Prefixed(TorchDistReader):
    """Adds the prefix of NeMo's wrapper to the names of the model's tensors."""

    def __init__(self, inner: TorchDistReader) -> None:
        self._inner = inner

    @property
    def files(self) -> list[Path]:
        return self._inner.files

    @property
    def names(self) -> list[str]:
        return [name if name.startswith("optimizer.") else _PREFIX + name for name in self._inner.names]

    def size(self, name: str) -> tuple[int, ...]:
        return self._inner.size(name.removeprefix(_PREFIX))

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(name.removeprefix(_PREFIX))

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        return self._inner.read(name.removeprefix(_PREFIX), offset, size)


def _config_path(folder: Path, config: str | Path | None) -> Path | None:
    if config is None:
        default = folder / "config.json"
        return default if default.is_file() else None
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise UserError(f"There is no config {path}; give a config.json or the folder that contains one.")
    return path
