"""Reads and writes Hugging Face folders, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.files.safetensors_file import SafetensorsWriter
from nemo_pvs.checkpoints.fingerprint import same_values
from nemo_pvs.checkpoints.huggingface.config import quantization, read_config, without_quantization
from nemo_pvs.checkpoints.huggingface.shards import Shards, few
from nemo_pvs.checkpoints.manifest import Manifest, Recorder
from nemo_pvs.checkpoints.masks import CONFIG_KEY, FILE, MaskFile, Masks, NoMasks, masks_of, write_masks
from nemo_pvs.checkpoints.source import Progress, WeightSource
from nemo_pvs.checkpoints.stored_tensors import StoredTensors
from nemo_pvs.checkpoints.tensor_record import TensorRecord
from nemo_pvs.data.assets import asset_files, copy_asset
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.not_a_model import refuse_quantised
from nemo_pvs.system.files import whole_folder, write_json
from nemo_pvs.system.progress import say_once

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5_000_000_000
"""The default of transformers."""

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"

# Suffixes of tensors that old checkpoints have in addition to the weights: a buffer, and a copy of a tied embedding.
_HARMLESS = ("rotary_emb.inv_freq", _HEAD)


class HuggingFaceSource:
    """A Hugging Face model folder: its weights in one file or many, of safetensors or of PyTorch."""

    format = "huggingface"
    """The format's name in manifests and descriptions."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder and check the names and sizes of its tensors against the config.

        No weights are read yet, with one exception: if the config ties the output head to the embedding but a head is
        stored, the two are compared. A different head unties the model.

        Raises:
            UserError: a file is missing or broken, or the weights do not fit the config: one is missing, extra, of
                another size, or quantised.
        """
        self.folder = Path(folder)
        config = read_config(self.folder / "config.json")
        self._weights = Shards(self.folder)
        if has_own_head(self.folder, config):
            say_once(
                f"{self.folder} ties the output head to the embedding in config.json but stores a different head: the "
                "head is kept and the model untied, as Transformers 5 loads it (Transformers 4 drops the head)."
            )
            config["tie_word_embeddings"] = False
        self._shape = Layout.for_config(config).shape(config)
        self._check_layers()
        self._parts = Layout.for_config(config).parts(self._shape)
        self._refuse_quantized(config)
        self.config: Mapping[str, Any] = without_quantization(config, self.folder / "config.json")
        self._check_weights()
        self._stored = StoredTensors(self.folder, self._weights.files)

    @property
    def assets(self) -> tuple[Path, ...]:
        """Tokenizer, chat template and generation config; never weights, whatever their names."""
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
        """Stored tensors that are not weights of the model: old rotary buffers, the copy of a tied head."""
        return tuple(name for name in self._weights.names if name not in self._parts)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._weights.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of a tensor.

        Raises:
            UserError: there is no such tensor, its file can no longer be read, or it differs from the manifest.
        """
        tensor = self._weights.read(name)
        self._stored.check(name, tensor)
        return tensor

    @property
    def manifest(self) -> Manifest | None:
        """The manifest that tensors are compared with as they are read; None if there is none or it is ignored."""
        return self._stored.manifest

    def checksums(self) -> Mapping[str, TensorRecord]:
        """Return the checksum of every tensor (``StoredTensors.checksums``)."""
        return self._stored.checksums(self)

    def _check_layers(self) -> None:
        """Refuse more layers than the files can hold, before anything is allocated per layer."""
        layers, tensors = self._shape.layers, len(self._weights.names)
        if layers > tensors:
            raise UserError(
                f"config.json in {self.folder} says {layers:,} layers, but the files there have {tensors:,} tensors; "
                "use the config.json that belongs to these weights."
            )

    def _refuse_quantized(self, config: Mapping[str, Any]) -> None:
        """Refuse weights that are stored quantised; plain weights are usable even if the config names a method."""
        unusual = []
        if quantization(config) is not None:
            unusual = [
                name for name in self._weights.names if name not in self._parts and not name.endswith(_HARMLESS)
            ]
            try:
                for name in self._weights.names:
                    self._weights.dtype(name)
            except UserError:
                unusual.append(name)
        refuse_quantised(self.folder, quantization(config), self._weights.names, unusual)

    def _check_weights(self) -> None:
        unknown = [name for name in self.extra_tensors if not name.endswith(_HARMLESS)]
        if unknown:
            raise UserError(
                f"{self.folder} has {len(unknown)} tensors that {self.config['architectures'][0]} with this "
                f"config.json does not have: {few(unknown)}; use the config.json that belongs to these weights."
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


def has_own_head(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a model whose config ties head and embedding stores a head that differs from the embedding."""
    if not config.get("tie_word_embeddings"):
        return False
    files = sorted(file for file in folder.iterdir() if file.suffix in {".safetensors", ".bin"})
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _heads_differ(folder, tuple(stamps))


@lru_cache(maxsize=16)
def _heads_differ(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> bool:
    """Compare head and embedding; cached per state of the files, because both are read and folders opened often."""
    weights = Shards(folder)
    if not {_EMBEDDING, _HEAD} <= set(weights.names):
        return False
    if weights.size(_EMBEDDING) != weights.size(_HEAD):
        return True
    return not same_values(weights.read(_EMBEDDING), weights.read(_HEAD))


def write_huggingface(
    source: WeightSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    before_rename: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write a model as a Hugging Face folder that ``from_pretrained`` loads.

    Args:
        source: The model.
        target: The folder to make.
        dtype: Cast every tensor to this dtype; None keeps the stored dtypes.
        max_shard_bytes: Maximum size of a shard, unless a single tensor is larger.
        allow_nonfinite: Write NaN and infinite values instead of refusing the tensors that have them.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.
        before_rename: Called with the temporary folder that is about to become ``target``; what it writes there
            appears together with the model, and an error removes everything.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        UserError: ``target`` exists or cannot be written, or the source is broken.
    """
    recorder = Recorder(source, dtype, progress, allow_nonfinite=allow_nonfinite)
    recorder.layout.require_class(recorder.shape)
    with whole_folder(Path(target), overwrite=overwrite) as folder:
        masks = masks_of(source)
        # Without an index, some loaders take every *.safetensors file for weights.
        _write_shards(recorder, folder, max_shard_bytes, with_index=bool(masks.names))
        config = {key: value for key, value in recorder.config().items() if key != CONFIG_KEY}
        if masks.names:
            write_masks(masks, folder / FILE)
            config[CONFIG_KEY] = FILE
        write_json(folder / "config.json", config)
        for asset in source.assets:
            copy_asset(asset, folder)
        manifest = recorder.finish(folder, "huggingface")
        if before_rename:
            before_rename(folder)
        return manifest


def _write_shards(recorder: Recorder, folder: Path, max_shard_bytes: int, *, with_index: bool) -> None:
    """Write the weights, and an index if ``with_index`` or if they fill more than one file."""
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
