"""One way to make a model sparse, in a process of its own, from its folder to the folder of the result.

    PYTHON -m tests.benchmarks.sparse_contenders CONTENDER JOB.json

The interpreter may be that of another environment, which has llm-compressor but not nemo_pvs: nothing is imported
before it is known who runs. What transformers would import in the middle of the work is imported before it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def ours(job: dict[str, Any]) -> Callable[[], None]:
    """Prune as ``pvs prune`` does, in the job's computing type."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.data.token_set import TokenSet
    from nemo_pvs.layerwise.model import Compute
    from nemo_pvs.pruning.sparse.sequential import prune_layers
    from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
    from nemo_pvs.pruning.sparse.sparsity import Sparsity
    from nemo_pvs.pruning.sparse.wanda import Wanda

    methods = {"sparsegpt": SparseGPT, "wanda": Wanda}

    def work() -> None:
        sparse = prune_layers(
            open_source(job["model"]),
            TokenSet(read_ids(job), {}),
            methods[job["method"]](Sparsity.parse(job["sparsity"])),
            Path(job["target"] + ".work"),
            compute=Compute(batch_size=job["batch_size"], dtype=getattr(torch, job["dtype"])),
            warn=lambda text: print(text, file=sys.stderr),
        )
        write_huggingface(sparse, Path(job["target"]))

    return work


def llm_compressor(job: dict[str, Any]) -> Callable[[], None]:
    """Prune with llm-compressor's ``oneshot``."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job["method"]]
    ratio, pattern = parsed(job["sparsity"])

    def work() -> None:
        ids = read_ids(job)
        oneshot(
            model=job["model"],
            precision=job["dtype"],
            recipe=modifier(
                sparsity=ratio,
                mask_structure="{}:{}".format(*pattern or (0, 0)),
                targets=["Linear"],
                ignore=["re:.*lm_head"],
            ),
            dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
            batch_size=job["batch_size"],
            shuffle_calibration_samples=False,
            save_compressed=False,
            output_dir=job["target"],
        )

    return work


def published(job: dict[str, Any]) -> Callable[[], None]:
    """Prune with the arithmetic of the published scripts."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from tests.benchmarks.published_scripts import prune

    def work() -> None:
        model = LlamaForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
        prune(model, read_ids(job), job["method"], *parsed(job["sparsity"]))
        model.save_pretrained(job["target"])

    return work


CONTENDERS = {"ours": ours, "llm-compressor": llm_compressor, "published": published}


def read_ids(job: dict[str, Any]) -> Any:
    """Return the calibration tokens that all contenders read, int32 [N, S]."""
    from safetensors.torch import load_file

    return load_file(job["ids"])["ids"]


def parsed(sparsity: str) -> tuple[float, tuple[int, int] | None]:
    """Return the ratio and the pattern, None if there is none."""
    if ":" not in sparsity:
        return float(sparsity), None
    zeros, group = map(int, sparsity.split(":"))
    return zeros / group, (zeros, group)


def peak_bytes() -> int:
    """Return the most bytes that were resident at once, counted since the interpreter was started."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """Run, and print what it took as JSON."""
    contender, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    begun = time.perf_counter()
    work = CONTENDERS[contender](job)
    ready, baseline = time.perf_counter(), peak_bytes()
    work()
    took = {"imports": ready - begun, "seconds": time.perf_counter() - ready, "baseline": baseline}
    print("\n" + json.dumps({**took, "peak": peak_bytes()}))


if __name__ == "__main__":
    main()
