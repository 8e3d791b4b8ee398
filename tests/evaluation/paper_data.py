"""The data sets of the preset ``paper`` in miniature: their columns and files, our own words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

_LETTERS = [json.loads(line) for line in (Path(__file__).parent / "tasks" / "letters.jsonl").read_text().splitlines()]


def _choice(question: str, *texts: str, right: int) -> dict[str, Any]:
    labels = ["A", "B", "C", "D"][: len(texts)]
    return {"question": question, "choices": {"text": list(texts), "label": labels}, "answerKey": labels[right]}


_SCIENCE = [
    _choice("What do bees make?", "honey", "milk", "glass", "rain", right=0),
    _choice("What falls in winter?", "leaves", "snow", "stars", "seeds", right=1),
    _choice("Which one is a metal?", "wood", "paper", "iron", "wool", right=2),
]
_DATA: dict[tuple[str, str | None], list[dict[str, Any]]] = {
    ("allenai/winogrande", "winogrande_xl"): [
        {
            "sentence": "The box did not fit the bag as _ was too big.",
            "option1": "box",
            "option2": "bag",
            "answer": "1",
        },
        {"sentence": "Tom gave Ben the pen so that _ could write.", "option1": "Tom", "option2": "Ben", "answer": "2"},
    ],
    ("allenai/ai2_arc", "ARC-Easy"): _SCIENCE,
    ("allenai/ai2_arc", "ARC-Challenge"): _SCIENCE[::-1],
    ("Rowan/hellaswag", None): [
        {
            "activity_label": "Baking",
            "ctx_a": "A man mixes flour and water.",
            "ctx_b": "then he",
            "endings": ["kneads the dough.", "sings to a fish.", "paints it blue.", "folds the car."],
            "label": "0",
        },
        {
            "activity_label": "Gardening",
            "ctx_a": "A girl digs a hole.",
            "ctx_b": "she",
            "endings": ["reads it aloud.", "puts a tree into it.", "drives home in it.", "boils it."],
            "label": "1",
        },
    ],
    ("baber/piqa", None): [
        {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the shelf.", "label": 0},
        {"goal": "Dry a shirt", "sol1": "Hang it under water.", "sol2": "Hang it in the sun.", "label": 1},
    ],
    ("allenai/sciq", None): [
        {
            "question": "What do lungs take in?",
            "distractor1": "stone",
            "distractor2": "light",
            "distractor3": "sound",
            "correct_answer": "air",
            "support": "Lungs draw in air and give it back.",
        },
    ],
    ("aps/super_glue", "boolq"): [
        {"passage": "Swans are large birds that can fly.", "question": "can swans fly", "label": 1, "idx": 0},
        {"passage": "Ostriches run fast but cannot fly.", "question": "can ostriches fly", "label": 0, "idx": 1},
    ],
    ("allenai/openbookqa", "main"): [
        {"question_stem": one["question"], **{key: one[key] for key in ("choices", "answerKey")}} for one in _SCIENCE
    ],
}


def write_paper_data(folder: Path) -> Path:
    """Write every data set and text as ``hf download`` leaves it in ``folder/<owner>/<name>``; return ``folder``."""
    configs: dict[str, list[str]] = {}
    for (repository, config), rows in _DATA.items():
        about = [f"- config_name: {config or 'default'}", "  data_files:"]
        for split in ("train", "validation", "test"):
            path = folder / repository / (config or "data") / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            about += [f"  - split: {split}", f"    path: {path.relative_to(folder / repository)}"]
        configs.setdefault(repository, []).extend(about)
    for repository, about in configs.items():
        (folder / repository / "README.md").write_text("\n".join(["---", "configs:", *about, "---", ""]))
    write_texts(folder)
    return folder


def write_texts(folder: Path, train: str = "Only the training split says this. ") -> None:
    """Write the three texts, held-out and training files, the latter of another text."""
    held_out = " ".join(letter["text"] for letter in _LETTERS)
    files = {
        "allenai/c4/en/c4-validation.00000-of-00008.json.gz": held_out,
        "allenai/c4/en/c4-train.00000-of-01024.json.gz": train * 20,
        "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet": held_out,
        "Salesforce/wikitext/wikitext-103-v1/train-00000-of-00002.parquet": train * 20,
        "abisee/cnn_dailymail/3.0.0/test-00000-of-00001.parquet": held_out,
        "abisee/cnn_dailymail/3.0.0/train-00000-of-00003.parquet": train * 20,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [text[:100], "", text[100:]]
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress("".join(json.dumps({"text": row}) + "\n" for row in rows).encode()))
        else:
            key = "article" if "cnn" in name else "text"
            pyarrow.parquet.write_table(pyarrow.table({key: rows}), path)
