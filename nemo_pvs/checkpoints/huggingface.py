"""Hugging Face folders as a source and a sink of tensors, one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.assets import asset_files
from nemo_pvs.checkpoints.manifest import Manifest, Progress, Recorder
from nemo_pvs.checkpoints.safetensors_file import SafetensorsReader, SafetensorsWriter
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, whole_folder, write_json
from nemo_pvs.layout import Layout

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HuggingFaceSource:
    """A Hugging Face model folder with safetensors weights."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder; no weight is read yet.

        Raises:
            UserError: a file is missing or broken, or the weights are not those of the config's family.
        """
        self.folder = Path(folder)
        self.config: Mapping[str, Any] = _read_config(self.folder)
        self._shape = Layout.for_config(self.config).shape(self.config)
        self._parts = Layout.for_config(self.config).parts(self._shape)
        self._shards: dict[str, SafetensorsReader] = {}
        self._shard_of = self._weight_map()
        self._refuse_unknown_tensors()

    @property
    def assets(self) -> tuple[Path, ...]:
        """Tokenizer, chat template and generation config; never weights, whatever their name."""
        return asset_files(self.folder)

    @property
    def extra_tensors(self) -> tuple[str, ...]:
        """Tensors that are stored but are no weights of the model: old rotary buffers, a tied head's copy."""
        return tuple(name for name in self._shard_of if name not in self._parts)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._shard(name).dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of one tensor.

        Raises:
            UserError: the tensor or its file is missing or broken, or its size is not what config.json says.
        """
        shard = self._shard(name)
        if name in self._parts:
            expected = self._parts[name][0].size(self._shape)
            if shard.size(name) != expected:
                raise UserError(
                    f"{name} in {self.folder} is {list(shard.size(name))}, but config.json implies {list(expected)}; "
                    "use the config.json that belongs to these weights."
                )
        return shard.read(name)

    def _shard(self, name: str) -> SafetensorsReader:
        file = self._shard_of.get(name)
        if file is not None and file not in self._shards:
            self._shards[file] = SafetensorsReader(self.folder / file)
        if file is None or name not in self._shards[file].names:
            raise UserError(f"{self.folder} has no tensor {name}, which its files promise; download the model again.")
        return self._shards[file]

    def _weight_map(self) -> dict[str, str]:
        index = self.folder / _INDEX
        if index.is_file():
            content = read_json(index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
                raise UserError(f"{index} has no usable weight_map; download it again.")
            return weight_map
        if not (self.folder / _WEIGHTS).is_file():
            raise UserError(
                f"{self.folder} has neither {_WEIGHTS} nor {_INDEX}; download the model's safetensors files."
            )
        self._shards[_WEIGHTS] = SafetensorsReader(self.folder / _WEIGHTS)
        return dict.fromkeys(self._shards[_WEIGHTS].names, _WEIGHTS)

    def _refuse_unknown_tensors(self) -> None:
        harmless = ("rotary_emb.inv_freq", "lm_head.weight")
        unknown = [name for name in self.extra_tensors if not name.endswith(harmless)]
        if unknown:
            raise UserError(
                f"{self.folder} has {len(unknown)} tensors that {self.config['architectures'][0]} does not have, such "
                f"as {unknown[0]}; models with biases, adapters or quantised weights are not supported."
            )


def write_huggingface(
    source: WeightSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model as a Hugging Face folder that ``from_pretrained`` loads.

    Args:
        source: The model.
        target: The folder to make.
        dtype: Cast every tensor to it; None keeps each as it is stored.
        max_shard_bytes: A shard is closed before it would grow beyond this, unless one tensor alone is larger.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        UserError: ``target`` exists or cannot be written, or the source is broken.
    """
    recorder = Recorder(source, dtype, progress)
    with whole_folder(Path(target), overwrite=overwrite) as folder:
        _write_shards(recorder, folder, max_shard_bytes)
        write_json(folder / "config.json", recorder.config())
        for asset in source.assets:
            shutil.copyfile(asset, folder / asset.name)
        return recorder.finish(folder, "huggingface")


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; the rope settings of transformers 5 are put where transformers 4 and we look for them."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a model's configuration; download it again.")
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        config.setdefault("rope_scaling", None if scaling.get("rope_type", "default") == "default" else scaling)
    return config


def _write_shards(recorder: Recorder, folder: Path, max_shard_bytes: int) -> None:
    """Write the weights, and the index if they fill more than one file."""
    names = list(recorder.parts)
    shards: list[SafetensorsWriter] = []
    for position, name in enumerate(names):
        tensor = recorder.read(name)
        if not shards or shards[-1].bytes_written + tensor.nbytes > max_shard_bytes:
            shards.append(SafetensorsWriter(folder / f"shard-{len(shards)}", names[position:]))
        shards[-1].write(name, tensor)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        shard.finish()
        file = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file)
        weight_map.update(dict.fromkeys(shard.names, file))
    if len(shards) > 1:
        total = sum(shard.bytes_written for shard in shards)
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
