"""SmolLM2-135M with fewer tokens: bits per byte without training, and how many more tokens a text then has.

    python -m tests.benchmarks.vocabulary [--sizes 32000 16000 8000] [--chunks 14] [--folder DIR]

Tokens are counted in one part of the Wikipedia sample; the table is measured on chunks of another part, evenly spaced
and of equal length, each with the beginning-of-text token in front. Words are those of both parts.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from nemo_pvs.api.prune import prune
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.corpus import WIKIPEDIA_SAMPLE, read_documents
from nemo_pvs.data.split import split_documents
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.result import PLAN
from nemo_pvs.system.progress import console

CHUNK = 1500
"""Characters of a chunk."""
SHARES = {"train": 0.85, "validation": 0.05, "calibration": 0.05, "test": 0.05}


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parent", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--sizes", type=int, nargs="+", default=[32000, 16000, 8000])
    options.add_argument("--chunks", type=int, default=14)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent(given.parent, given.folder)
    parts = split_documents(list(read_documents(WIKIPEDIA_SAMPLE)), SHARES)
    train, test = ("\n".join(document.text for document in parts[name]) for name in ("train", "test"))
    starts = [round(index * (len(test) - CHUNK) / max(1, given.chunks - 1)) for index in range(given.chunks)]
    chunks = [test[start : start + CHUNK] for start in starts]
    headings = ("tokens", "parameters (M)", "tokens per byte", "nats per token", "bits per byte", "words", "changed")
    table = Table(*headings, "with a removed token", box=box.MARKDOWN)
    table.add_row(*measured(folder, chunks, test), "", "", "")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "train.txt"
        text.write_text(train)
        for size in given.sizes:
            small = Path(scratch) / str(size)
            prune(folder, small, "vocabulary", target=f"vocab={size}", data=text)
            table.add_row(*measured(small, chunks, test), *words(folder, small, train[:300_000] + test))
    Console(width=160, highlight=False).print(table)


def measured(folder: Path, chunks: list[str], text: str) -> list[str]:
    """Return tokens, parameters, and loss on the chunks, and print them; tokens per byte are of the whole text.

    Computed in bf16, four times as fast as fp32 on processors that have instructions for it.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    loss = tokens = 0.0
    for chunk in chunks:
        ids = torch.tensor([[model.config.bos_token_id, *tokenizer.encode(chunk, add_special_tokens=False).ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.numel() - 1
    shape = shape_of(open_source(folder))
    bits = loss / math.log(2) / sum(len(chunk.encode()) for chunk in chunks)
    per_byte = len(tokenizer.encode(text, add_special_tokens=False).ids) / len(text.encode())
    row = [
        f"{shape.vocab:,}",
        f"{shape.parameters / 1e6:.1f}",
        f"{per_byte:.4f}",
        f"{loss / tokens:.3f}",
        f"{bits:.3f}",
    ]
    console.print(*row)
    return row


def words(parent: Path, small: Path, text: str) -> list[str]:
    """Return how many words have only kept tokens, how many of these have other tokens now, and all other words."""
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (parent, small))
    kept = Plan.load(small / PLAN).keep_vocab
    assert kept is not None
    ids = {index: number for number, index in enumerate(kept)}
    same = changed = removed = 0
    for word, count in Counter(word for word, _ in old.pre_tokenizer.pre_tokenize_str(text)).items():
        before = [token.id for token in old.model.tokenize(word)]
        if not ids.keys() >= {*before}:
            removed += count
            continue
        same += count
        changed += count * ([ids[index] for index in before] != [token.id for token in new.model.tokenize(word)])
    return [f"{same:,}", f"{changed:,}", f"{removed:,}"]


if __name__ == "__main__":
    main()
