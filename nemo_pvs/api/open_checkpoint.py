"""Opening a checkpoint, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_pvs.checkpoints.gguf.model import GgufSource
    from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
    from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource


def open_checkpoint(
    source: str | Path, *, config: str | Path | None = None, ignore_manifest: bool = False
) -> HuggingFaceSource | NemoSource | GgufSource:
    """Open a checkpoint; no weight is read before it is asked for.

    Args:
        source: Checkpoint folder of any format, ``.gguf`` file, ``smollm2-135m`` or ``hf://owner/name``, which is
            downloaded into the cache of ``huggingface_hub``.
        config: ``config.json`` for a bare Megatron-LM folder.
        ignore_manifest: Read weights that differ from the checkpoint's manifest.

    Returns:
        Its ``config``, in Hugging Face's terms, and its tensors by their Hugging Face names (``read``).

    Raises:
        UserError: ``source`` does not exist, or is not a checkpoint that can be read.

    Example:
        >>> import nemo_pvs as pvs
        >>> checkpoint = pvs.open_checkpoint(model)
        >>> checkpoint.config["num_hidden_layers"], tuple(checkpoint.read("model.norm.weight").shape)
        (4, (64,))
    """
    from nemo_pvs.checkpoints.fetch import SMOLLM2, is_gguf, local_checkpoint, packaged_smollm2
    from nemo_pvs.checkpoints.gguf.file import GgufFile
    from nemo_pvs.checkpoints.gguf.model import GgufSource
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

    if str(source) == SMOLLM2:
        return GgufSource(GgufFile(packaged_smollm2()))
    if is_gguf(str(source)):
        return GgufSource(GgufFile(Path(source)))
    with ignoring_manifests(ignore_manifest), local_checkpoint(str(source)) as folder:
        return open_source(folder, config)
