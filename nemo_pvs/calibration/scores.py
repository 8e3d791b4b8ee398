"""Scores: the results of calibration, as safetensors with a JSON manifest. Score once, prune to many targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import read_json, sha256_bytes, sha256_file, sha256_json, whole_folder, write_json

_TENSORS = "scores.safetensors"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Scores:
    """Importances of a model's units, float64; layers and units count from 0 in the model's own order."""

    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    """For each aggregation (``energy``, ``meanabs_l2``): ``hidden.<aggregation>`` [d], ``ffn.<aggregation>`` [L, f]
    and ``heads.<aggregation>`` [L, H]; then ``block_influence`` [L], and the calibration ``tokens``, int32 [N, S].

    For the inputs of ``o_proj`` (``attention.<name>`` [L, H*h]) and of ``down_proj`` (``ffn.<name>`` [L, f]) also
    ``energy``, ``mean``, ``variance`` and, only if measured on one rank, ``fluctuation`` (``statistics.Moments``); for
    the weight's columns ``weight_energy``, the sum of squares, and ``weight_mean_abs``, the mean absolute value.

    With gradients also ``groups.<metric>`` [L, G], ``heads.<metric>`` [L, H] and
    ``ffn.<metric>`` [L, f] for each of ``taylor.METRICS``."""
    manifest: Mapping[str, Any]
    """The model (``model_fingerprint``, ``shape``), the token set (``tokens``) and the software ``versions``."""

    @property
    def shape(self) -> Shape:
        """The Shape of the measured model."""
        return Shape.from_dict(self.manifest["shape"])

    @property
    def model_fingerprint(self) -> str:
        """The fingerprint of the measured model (``checkpoints.fingerprint``)."""
        return str(self.manifest["model_fingerprint"])

    def channels(self, site: str, name: str) -> torch.Tensor:
        """Return a statistic of the inputs of ``o_proj`` (site ``attention``) or ``down_proj`` (site ``ffn``).

        Raises:
            UserError: the scores lack it, because several ranks measured them.
        """
        try:
            return self.tensors[f"{site}.{name}"]
        except KeyError:
            raise UserError(f"These scores lack {site}.{name}; calibrate again, on one rank.") from None

    @property
    def tokens(self) -> TokenSet:
        """The calibration tokens, so that a depth scan can use the same ones."""
        return TokenSet(self.tensors["tokens"], dict(self.manifest["tokens"]))

    @property
    def content_hash(self) -> str:
        """A SHA-256 of tensors, model and tokens, independent of versions and folder."""
        tensors = {}
        for name, tensor in self.tensors.items():
            tensors[name] = sha256_bytes(tensor.contiguous().numpy().tobytes())
        return sha256_json(
            {"model_fingerprint": self.model_fingerprint, "tokens": self.manifest["tokens"], "tensors": tensors}
        )

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write ``scores.safetensors`` and ``manifest.json`` into ``folder``, atomically.

        Raises:
            UserError: the folder exists and ``overwrite`` is false, or it cannot be written.
        """
        with whole_folder(folder, overwrite=overwrite) as partial:
            save_file(dict(self.tensors), partial / _TENSORS)
            write_json(partial / _MANIFEST, {**self.manifest, "sha256": sha256_file(partial / _TENSORS)})

    @classmethod
    def load(cls, folder: Path, source: WeightSource | None = None) -> Scores:
        """Read scores that ``save`` wrote and, if ``source`` is given, check that they belong to it.

        Raises:
            UserError: the folder holds no scores, they are damaged, or they were measured on another model.
        """
        manifest = read_json(folder / _MANIFEST)
        try:
            tensors = load_file(folder / _TENSORS)
            intact = manifest.pop("sha256") == sha256_file(folder / _TENSORS)
        except (FileNotFoundError, SafetensorError, KeyError, AttributeError, TypeError):
            intact = False
        if not intact:
            raise UserError(f"The scores in {folder} are damaged or incomplete; calibrate again.")
        scores = cls(tensors, manifest)
        if source is not None:
            scores.check_model(source)
        return scores

    def check_model(self, source: WeightSource) -> None:
        """Raise UserError unless the scores were measured on the model in ``source``."""
        if fingerprint(source) != self.model_fingerprint:
            raise UserError(
                f"These scores were measured on another model ({self.shape}); "
                "calibrate the model that is to be pruned."
            )
