"""Runs in an interpreter whose Transformers is version 5: what it computes and saves, for the tests to compare.

python -m tests.transformers5.in_version_5 load FOLDER...     FOLDER.logits.pt for each
python -m tests.transformers5.in_version_5 save FOLDER CASES  random models and FOLDER/CASE.logits.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import nemo_pvs.modeling  # noqa: F401 (registers layers of different sizes)

IDS = torch.arange(3, 63)[None]
TEXT = "The boat, 1999 boats:\n\n  naïve café 中文 I'll"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(IDS).logits


def load(folder: Path) -> None:
    """Record logits, and the ids of a text where there is a tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    recorded: dict[str, Any] = {"logits": logits(model)}
    if (folder / "tokenizer.json").exists():
        recorded["ids"] = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    torch.save(recorded, folder.with_name(f"{folder.name}.logits.pt"))


def save(folder: Path, name: str, class_name: str, settings: dict[str, Any]) -> None:
    """Save a random model in which every vector matters."""
    torch.manual_seed(0)
    class_ = getattr(transformers, class_name)
    model = class_(class_.config_class(**settings))
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, *((0.5, 1.5) if parameter.ndim == 1 else (-0.2, 0.2)))
    model.save_pretrained(folder / name)
    torch.save({"logits": logits(model)}, folder / f"{name}.logits.pt")


if __name__ == "__main__":
    assert transformers.__version__.startswith("5."), transformers.__version__
    if sys.argv[1] == "load":
        for argument in sys.argv[2:]:
            load(Path(argument))
    else:
        for name, class_name, settings in json.loads(sys.argv[3]):
            save(Path(sys.argv[2]), name, class_name, settings)
