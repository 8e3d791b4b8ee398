"""A Hugging Face folder as Transformers reads it, to compare our reading with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.huggingface.folder import has_own_head
from nemo_pvs.checkpoints.huggingface.shards import Shards
from nemo_pvs.errors import UserError


class AsTransformersLoads:
    """The model that ``AutoModelForCausalLM.from_pretrained`` builds from a folder, one tensor at a time.

    The class, the settings and their defaults are those of Transformers, and the tensors are read as stored, without
    ``HuggingFaceSource``. In two points this follows Transformers 5, whichever version is installed, because version 4
    ignores something in the files: ``rope_parameters``, and a separate head where config.json ties it to the
    embedding.
    """

    assets: tuple[Path, ...] = ()

    def __init__(self, folder: Path) -> None:
        """Read the config with Transformers; no weight is read yet.

        Raises:
            UserError: Transformers cannot load it.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        import nemo_pvs.model.hf_classes  # noqa: F401  (registers our classes)

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            class_: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        except Exception as error:  # a config class can raise anything
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"Transformers cannot load {folder}, which --verify logits needs ({reason}); use --verify checksum."
            ) from error
        self.config: dict[str, Any] = {**config.to_dict(), "architectures": [class_.__name__]}
        moved = self.config.pop("rope_parameters", None)
        if moved:
            self.config["rope_theta"] = moved.get("rope_theta", self.config["rope_theta"])
            self.config["rope_scaling"] = {key: value for key, value in moved.items() if key != "rope_theta"}
        if has_own_head(folder, self.config):
            self.config["tie_word_embeddings"] = False
        self._weights = Shards(folder)

    def read(self, name: str) -> torch.Tensor:
        """Return a stored tensor."""
        return self._weights.read(name)
