"""A Hugging Face folder by Transformers' reading of its config, to compare ours with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.huggingface.folder import has_own_head
from nemo_pvs.checkpoints.huggingface.shards import Shards
from nemo_pvs.errors import UserError


class AsTransformersLoads:
    """The model that ``AutoModelForCausalLM.from_pretrained`` makes of a folder, a tensor at a time.

    The class, the settings and their defaults are those of Transformers, and the tensors are the stored ones under
    their own names; ``HuggingFaceSource`` has no part in it. Versions differ in two points, in which this is version 5
    whichever is installed, because 4 leaves out something that is in the files: it does not know ``rope_parameters``,
    and it replaces a separate head by the embedding where config.json ties them.
    """

    assets: tuple[Path, ...] = ()

    def __init__(self, folder: Path) -> None:
        """Have Transformers read the config; no weight is read yet.

        Raises:
            UserError: Transformers does not load it.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        import nemo_pvs.model.hf_classes  # noqa: F401  (registers our classes)

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            class_: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        except Exception as error:  # whatever a class finds wrong with its settings
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"Transformers does not load {folder}, with which --verify logits compares ({reason}); use --verify "
                "checksum."
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
