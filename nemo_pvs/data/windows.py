"""The fixed validation windows: the same tokens, each predicted once, for Megatron's validation loss and for ours."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_pvs.data.token_set import TokenSet, read_token_file
from nemo_pvs.data.tokenize import write_token_file
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_bytes


def validation_windows(prefix: Path, *, samples: int, sequence_length: int) -> TokenSet:
    """Cut the first ``samples * sequence_length + 1`` tokens of ``prefix`` into windows that overlap by one token.

    Each window has ``sequence_length + 1`` tokens, of which ``sequence_length`` are predicted, so every token after
    the first is predicted exactly once, as by Megatron's GPTDataset on one document of that length.

    Raises:
        UserError: there are too few tokens.
    """
    stream = read_token_file(prefix)
    wanted = samples * sequence_length + 1
    if len(stream) < wanted:
        raise UserError(
            f"{prefix}.bin has {len(stream):,} tokens, but {samples} validation samples of {sequence_length} need "
            f"{wanted:,}; use more text or fewer validation_samples."
        )
    ids = torch.from_numpy(stream[:wanted].astype("int32")).unfold(0, sequence_length + 1, sequence_length)
    manifest = {
        "data_set": prefix.name,
        "samples": samples,
        "sequence_length": sequence_length,
        "ids_sha256": sha256_bytes(ids.contiguous().numpy().tobytes()),
    }
    return TokenSet(ids.contiguous(), manifest)


def write_validation_document(windows: TokenSet, prefix: Path, vocab: int) -> None:
    """Write the windows' tokens as one document; one epoch of Megatron's dataset on it is exactly these windows."""
    write_token_file(prefix, [torch.cat([windows.ids[0], windows.ids[1:, 1:].flatten()]).tolist()], vocab)
