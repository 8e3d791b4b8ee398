"""Training a tokenizer, for a parent that you train from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_pvs.system.files import check_new_folder
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import progress


def train_tokenizer(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    vocab: int,
    text_key: str = "text",
) -> Path:
    """Train a byte-level BPE tokenizer on text, and write it as a Hugging Face folder.

    Args:
        inputs: Text files or folders of them, or ``wikipedia-sample``.
        out: The folder to write.
        vocab: Size of the vocabulary, with the 256 bytes and ``<|endoftext|>``.
        text_key: Key or column that holds the text.

    Returns:
        ``out``.

    Raises:
        UserError: a file cannot be read, there is something at ``out``, or the vocabulary does not fit the text.

    Example:
        >>> import nemo_pvs as pvs
        >>> path = pvs.train_tokenizer(text, folder / "tokenizer", vocab=258)
        >>> manifests = pvs.tokenize(text, path, folder / "tokens")
    """
    out = Path(out)
    check_new_folder(out)
    from nemo_pvs.data.corpus import read_documents
    from nemo_pvs.data.train_tokenizer import train_tokenizer as train

    files = [inputs] if isinstance(inputs, (str, Path)) else inputs
    with locked_target(out), progress("train a tokenizer", "documents") as show:
        train(read_documents([str(file) for file in files], text_key=text_key), out, vocab, show)
    return out
