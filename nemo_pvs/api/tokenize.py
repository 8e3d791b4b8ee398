"""Turning text into the token files that training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.api.values import parse_shard, parse_shares
from nemo_pvs.system.folder_lock import locked_folder, locked_target
from nemo_pvs.system.output_paths import check_folder
from nemo_pvs.system.progress import progress


def tokenize(
    inputs: str | Path | Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    split: str | Mapping[str, float] = "train=0.9,validation=0.1",
    text_key: str = "text",
    seed: int = 0,
    workers: int | None = None,
    shard: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Turn text into Megatron token files, split by document; an interrupted call is resumed.

    Args:
        inputs: Text files or folders of them, or ``wikipedia-sample``.
        tokenizer: Hugging Face folder whose tokenizer to use.
        out: The folder for ``<split>.bin``, ``<split>.idx`` and ``<split>.json``.
        split: Share of the documents that each split gets; they add up to 1.
        text_key: Key or column that holds the text.
        seed: Seed of the split.
        workers: Processes that share the text; None for one per core.
        shard: ``3/16`` tokenises only the third of 16 shares of the text, so that machines can share it; when all
            are done, a call without ``shard`` joins them.

    Returns:
        The manifest of each split: its ``documents``, ``tokens`` and hashes. Empty with ``shard``.

    Raises:
        UserError: a file cannot be read, the shares do not add up to 1, or a split would be empty.

    Example:
        >>> import nemo_pvs as pvs
        >>> manifests = pvs.tokenize(text, model, folder / "data", split={"train": 0.6, "validation": 0.4})
        >>> sorted(manifests), sum(manifest["documents"] for manifest in manifests.values())
        (['train', 'validation'], 40)
    """
    out = Path(out)
    check_folder(out)
    from nemo_pvs.data.shards import PARTS, tokenize_files

    files = [inputs] if isinstance(inputs, (str, Path)) else inputs
    number = None if shard is None else parse_shard(shard)
    lock = locked_folder(out) if number is None else locked_target(out / PARTS / "{}-of-{}".format(*number))
    with lock, progress("tokenise", "parts") as show:
        return tokenize_files(
            [str(file) for file in files],
            Path(tokenizer),
            out,
            parse_shares(split) if isinstance(split, str) else split,
            seed=seed,
            text_key=text_key,
            workers=workers,
            shard=number,
            progress=show,
        )
