"""Print the packages that a training and these tests import, ``name==version`` a line, but for what belongs to a GPU.

``python -m tests.gpu.needed`` trains two steps of a tiny model in this process and looks at what has been imported.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib import import_module
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

_WITH_THE_GPU = re.compile(r"(torch|triton|nvidia[-_](?!modelopt|resiliency).*|cuda[-_].*|pynvml)$", re.IGNORECASE)
"""PyTorch and NVIDIA's libraries: those of the machine with the GPU are used."""
_ALSO = ("hypothesis", "pytest", "tensorboard.summary.writer.event_file_writer", "tests.gpu.test_layerwise")


def needed() -> list[str]:
    """Return what is imported by now, sorted, without this package itself."""
    modules = {name.split(".")[0] for name in sys.modules} - {"tests"}  # wheels bring theirs by mistake
    distributions = packages_distributions()
    found = {name for module in modules for name in distributions.get(module, ())}
    packages = [distribution(name) for name in found if name != "nemo-pvs" and not _WITH_THE_GPU.match(name)]
    # Setuptools brings some inside itself.
    own = [one for one in packages if Path(str(one.locate_file(""))).name != "_vendor"]
    return sorted((f"{one.metadata['Name']}=={one.version}" for one in own), key=str.lower)


def _train(folder: Path) -> None:
    from nemo_pvs.megatron import rank
    from tests.conftest import make_tiny_llama, save_tiny_tokenizer
    from tests.megatron.jobs import tiny_job

    job = tiny_job(folder, save_tiny_tokenizer(make_tiny_llama(folder / "model")), steps=2)
    job.folder.mkdir()
    rank.train_on_cpu(job)


def main() -> None:
    """Print them; what libraries print goes to standard error."""
    from nemo_pvs.system.megatron_import import import_megatron

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import_megatron()
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder))
    for name in _ALSO:
        import_module(name)
    print("\n".join(needed()), file=answers, flush=True)
    os._exit(0)  # Megatron's and gloo's threads need not be unwound


if __name__ == "__main__":
    main()
