"""Hugging Face folders as a source and a sink of tensors, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.assets import asset_files, copy_asset
from nemo_pvs.checkpoints.config_types import check_types
from nemo_pvs.checkpoints.manifest import Manifest, Recorder
from nemo_pvs.checkpoints.masks import CONFIG_KEY, FILE, MaskFile, Masks, NoMasks, masks_of, write_masks
from nemo_pvs.checkpoints.safetensors_file import SafetensorsWriter
from nemo_pvs.checkpoints.shards import Shards, few
from nemo_pvs.checkpoints.source import Progress, WeightSource
from nemo_pvs.checkpoints.stored_tensors import StoredTensors
from nemo_pvs.checkpoints.tensor_record import TensorRecord
from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, whole_folder, write_json
from nemo_pvs.layout import Layout

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5_000_000_000
"""What transformers splits at, too."""

# Ends of names of tensors that old checkpoints hold beside the weights: a buffer, and the copy of a tied embedding.
_HARMLESS = ("rotary_emb.inv_freq", "lm_head.weight")


class HuggingFaceSource:
    """A Hugging Face model folder: its weights in one file or many, of safetensors or of PyTorch."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder and compare what its files promise with the config; no weight is read yet.

        Raises:
            UserError: a file is missing or broken, or the weights are not those of the config: one is missing,
                surplus, of another size or quantised.
        """
        self.folder = Path(folder)
        self.config: Mapping[str, Any] = read_config(self.folder / "config.json")
        self._shape = Layout.for_config(self.config).shape(self.config)
        self._weights = Shards(self.folder)
        self._check_layers()
        self._parts = Layout.for_config(self.config).parts(self._shape)
        self._check_weights()
        self._stored = StoredTensors(self.folder, self._weights.files)

    @property
    def assets(self) -> tuple[Path, ...]:
        """Tokenizer, chat template and generation config; never weights, whatever their name."""
        return asset_files(self.folder)

    @cached_property
    def masks(self) -> Masks:
        """The masks in the file that config.json names; most models have none."""
        file = self.config.get(CONFIG_KEY)
        if file is None:
            return NoMasks()
        sizes = {name: part.size(self._shape) for name, (part, _) in self._parts.items()}
        path = self.folder / Path(str(file)).name
        masks = MaskFile(path, sizes)
        self._stored.check_file(path)
        return masks

    @property
    def extra_tensors(self) -> tuple[str, ...]:
        """Tensors that are stored but are no weights of the model: old rotary buffers, a tied head's copy."""
        return tuple(name for name in self._weights.names if name not in self._parts)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._weights.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of one tensor.

        Raises:
            UserError: there is no such tensor, its file can no longer be read, or it is not what the manifest says.
        """
        tensor = self._weights.read(name)
        self._stored.check(name, tensor)
        return tensor

    @property
    def manifest(self) -> Manifest | None:
        """What its tensors are compared with as they are read; None where there is none, or it is to be ignored."""
        return self._stored.manifest

    def checksums(self) -> Mapping[str, TensorRecord]:
        """Return the checksum of every tensor (``StoredTensors.checksums``)."""
        return self._stored.checksums(self)

    def _check_layers(self) -> None:
        """Refuse a number of layers that the files cannot hold, before anything is made for each layer."""
        layers, tensors = self._shape.layers, len(self._weights.names)
        if layers > tensors:
            raise UserError(
                f"config.json in {self.folder} says {layers:,} layers, but the files there hold {tensors:,} tensors; "
                "use the config.json that belongs to these weights."
            )

    def _check_weights(self) -> None:
        unknown = [name for name in self.extra_tensors if not name.endswith(_HARMLESS)]
        if unknown:
            raise UserError(
                f"{self.folder} has {len(unknown)} tensors that {self.config['architectures'][0]} with this "
                f"config.json does not have: {few(unknown)}; adapters and quantised weights are not supported."
            )
        stored = set(self._weights.names)
        missing = [name for name in self._parts if name not in stored]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} tensors that its config.json implies: {few(missing)}; "
                "download the model again."
            )
        for name, (part, _) in self._parts.items():
            expected = part.size(self._shape)
            if self._weights.size(name) != expected:
                raise UserError(
                    f"{name} in {self.folder} is {list(self._weights.size(name))}, but config.json implies "
                    f"{list(expected)}; use the config.json that belongs to these weights."
                )
            self._weights.dtype(name)


def write_huggingface(
    source: WeightSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model as a Hugging Face folder that ``from_pretrained`` loads.

    Args:
        source: The model.
        target: The folder to make.
        dtype: Cast every tensor to it; None keeps each as it is stored.
        max_shard_bytes: A shard is closed before it would grow beyond this, unless one tensor alone is larger.
        allow_nonfinite: Write NaN and infinite values, too, instead of refusing the tensor that has them.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        UserError: ``target`` exists or cannot be written, or the source is broken.
    """
    recorder = Recorder(source, dtype, progress, allow_nonfinite=allow_nonfinite)
    recorder.layout.require_class(recorder.shape)
    with whole_folder(Path(target), overwrite=overwrite) as folder:
        masks = masks_of(source)
        # Some loaders take every *.safetensors for weights unless an index tells which are.
        _write_shards(recorder, folder, max_shard_bytes, with_index=bool(masks.names))
        config = {key: value for key, value in recorder.config().items() if key != CONFIG_KEY}
        if masks.names:
            write_masks(masks, folder / FILE)
            config[CONFIG_KEY] = FILE
        write_json(folder / "config.json", config)
        for asset in source.assets:
            copy_asset(asset, folder)
        return recorder.finish(folder, "huggingface")


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json; the rope settings of transformers 5 are put where transformers 4 and we look for them.

    Raises:
        UserError: it is missing or broken.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's configuration; download it again.")
    check_types(config, path)
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        config.setdefault("rope_scaling", None if scaling.get("rope_type", "default") == "default" else scaling)
    return config


def _write_shards(recorder: Recorder, folder: Path, max_shard_bytes: int, *, with_index: bool) -> None:
    """Write the weights, and the index if it is asked for or they fill more than one file."""
    names = list(recorder.parts)
    shards: list[SafetensorsWriter] = []
    for position, name in enumerate(names):
        tensor = recorder.read(name)
        if not shards or shards[-1].bytes_written + tensor.nbytes > max_shard_bytes:
            if shards:
                shards[-1].finish()
            shards.append(SafetensorsWriter(folder / f"shard-{len(shards)}", names[position:]))
        shards[-1].write(name, tensor)
    shards[-1].finish()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file)
        weight_map.update(dict.fromkeys(shard.names, file))
    if with_index or len(shards) > 1:
        total = sum(shard.bytes_written for shard in shards)
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
