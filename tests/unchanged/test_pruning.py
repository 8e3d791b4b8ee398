"""What every method that prunes by itself keeps of a small model: units, layers, single weights, and the result.

The units of a plan and the bits of a mask are decisions between importances that are far apart compared with rounding,
so they are the same on every CPU; importances themselves, and weights and biases computed from them, are left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from tests.unchanged.models import make_exact_llama, make_text

PLANNED = {
    "minitron-width": "minitron-width --target hidden=40,ffn=56",
    "minitron-width-ratio": "minitron-width --ratio 0.5",
    "minitron-width-meanabs": "minitron-width --target kv_groups=1,ffn=56 --aggregation meanabs_l2",
    "minitron-width-heads": "minitron-width --target kv_groups=3,heads=3",
    "minitron-depth": "minitron-depth --target layers=2",
    "minitron-depth-greedy": "minitron-depth --target layers=2 --search greedy --protect-first 1",
    "minitron-depth-sleb": "minitron-depth --target layers=3 --search sleb",
    "minitron-depth-individual": "minitron-depth --target layers=2 --search individual",
    "minitron-depth-compat": "minitron-depth --target layers=3 --compat",
    "minitron-joint": "minitron-joint --target layers=3,hidden=40,ffn=56",
    "shortgpt": "shortgpt --target layers=2",
    "flap": "flap --ratio 0.3 --no-bias",
    "flap-uniform": "flap --ratio 0.3 --no-bias --structure UL-UM",
    "flap-compat": "flap --ratio 0.3 --no-bias --metric WIFN --compat",
    "flap-heads": "flap --ratio 0.3 --no-bias --attention-unit heads",
    "wanda-sp": "wanda-sp --ratio 0.3",
    "magnitude-sp": "magnitude-sp --ratio 0.3 --ffn-multiple 8",
    "llm-pruner": "llm-pruner --ratio 0.3 --protect-first 1",
    "llm-pruner-param-mix": "llm-pruner --ratio 0.5 --metric param_mix --structure UL-MM",
    "adapt-pruner": "adapt-pruner --ratio 0.2 --iterations 10",
}
SPARSITIES = ("0.5", "2:4", "4:8")
SPARSE = {
    **{
        f"{method}-{kind.replace(':', '-')}": f"{method} --sparsity {kind}"
        for method in ("magnitude", "wanda", "sparsegpt")
        for kind in SPARSITIES
    },
    "magnitude-compat": "magnitude --sparsity 0.5 --compat",
    "wanda-at-once": "wanda --sparsity 2:4 --no-sequential",
    "sparsegpt-compat": "sparsegpt --sparsity 0.5 --compat",
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return make_exact_llama(tmp_path_factory.mktemp("parent"), num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def small_parent(tmp_path_factory) -> Path:
    """A model of few weights, so that hardly two of them are of the same importance but for rounding."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return make_exact_llama(tmp_path_factory.mktemp("small"), **sizes, head_dim=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def _prune(pvs, parent: Path, folder: Path, method: str, text: Path) -> Path:
    code, _, errors = pvs(
        *("prune", parent, folder, "--method", *method.split(), "--data", text),
        *("--samples", 16, "--sequence-length", 32, "--device", "cpu"),
    )
    assert code == 0, errors
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("case", PLANNED)
def test_plans_and_what_they_cut(case, parent, text, tmp_path, pvs, golden):
    folder = _prune(pvs, parent, tmp_path / "pruned", PLANNED[case], text)
    plan = json.loads((folder / "pvs_plan.json").read_text())
    del plan["provenance"]  # names scores and losses, which are sums
    decided = {
        "command": PLANNED[case],
        "plan": plan,
        "fingerprint": fingerprint(open_source(folder)),
        "model.safetensors": _sha256(folder / "model.safetensors"),
    }
    golden(f"plans/{case}.json", json.dumps(decided, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("case", SPARSE)
def test_masks_of_sparse_models(case, small_parent, text, tmp_path, pvs, golden):
    folder = _prune(pvs, small_parent, tmp_path / "sparse", SPARSE[case], text)
    weights = load_file(folder / "model.safetensors")
    masks = {name: _bits(weight) for name, weight in sorted(weights.items()) if weight.ndim == 2}
    decided = {
        "command": SPARSE[case],
        "settings": json.loads((folder / "pvs_pruning.json").read_text()),
        "masks": masks,
        **({"fingerprint": fingerprint(open_source(folder))} if "sparsegpt" not in case else {}),
    }
    golden(f"masks/{case}.json", json.dumps(decided, indent=1) + "\n")


def _bits(weight) -> str:
    """Return the number of zeros, and a hash of where they are."""
    zeros = (weight == 0).numpy()
    return f"{zeros.sum()} zeros, {hashlib.sha256(np.packbits(zeros)).hexdigest()}"
