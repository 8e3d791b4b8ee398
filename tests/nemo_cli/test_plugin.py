"""NeMo's own command with this package as an installed plugin: from a wheel, in a folder of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import make_tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that the wheel, and nothing else, is installed in."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # From a copy of what git knows or would: building in the checkout leaves build/ there.
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    source = tmp_path_factory.mktemp("source")
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["--no-build-isolation", "--target", str(folder), str(source)]
    done = subprocess.run([*pip, *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


_SERVER = """
import gc, json, os, runpy, sys, traceback
import nemo.collections.llm
gc.freeze()
for line in sys.stdin:
    script, arguments, environment, output = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(environment)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [script, *arguments]
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def nemo(installed, tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Run the ``nemo`` script as somebody would who has installed the wheel, outside of the checkout.

    Each command is a process of its own, forked from one that has imported NeMo, and nothing of ours.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "COLUMNS": "250",
        "NEMORUN_HOME": str(installed / "home"),
        # What launch/README.md asks for on a machine with the CUDA toolkit and no device; it means nothing elsewhere.
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    script = str(Path(sys.executable).with_name("nemo"))
    outputs = tmp_path_factory.mktemp("outputs")
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=installed,
    ) as server:  # fmt: skip

        def run(*arguments: object, **variables: str) -> str:
            output = outputs / str(len(os.listdir(outputs)))
            print(
                json.dumps([script, list(map(str, arguments)), variables, str(output)]), file=server.stdin, flush=True
            )
            code = server.stdout.readline()
            assert code.strip() == "0", output.read_text()[-4000:]
            return output.read_text()

        yield run
        server.stdin.close()


def test_the_wheel_holds_recipes_profiles_and_tables(installed):
    for name in (
        "recipes/llama31_8b/base.yaml",
        "launch/slurm_h100.yaml",
        "launch/slurm.sbatch",
        "conversions/llama.yaml",
    ):
        assert (installed / "nemo_pvs" / name).is_file()


def test_nemo_pvs_runs_a_verb(nemo, tmp_path):
    """And finds a model in the home directory, though no shell has seen the ``~``."""
    make_tiny_llama(tmp_path / "model")
    nemo("pvs", "convert", "source=~/model", "target=~/nemo", "--yes", HOME=str(tmp_path))
    assert (tmp_path / "nemo" / "weights" / ".metadata").exists()


def test_nemo_pvs_lists_the_verbs(nemo):
    out = nemo("pvs", "--help")
    for verb in ("convert", "inspect", "prune", "train", "run", "recipes"):
        assert verb in out


def test_nemo_llm_shows_the_8b_width_recipe(nemo):
    name = "pvs_llama31_8b_minitron_width(target=4b-width,tokens=50e9)"
    out = nemo("llm", "pretrain", "--factory", name, "trainer.strategy.tensor_model_parallel_size=4", "--dryrun")
    assert "Dry run for pretrain" in out
    for value in ("3072", "9216", "11921"):  # hidden, ffn, steps
        assert value in out


def test_nemo_llm_prune_runs_our_pruning(nemo, tmp_path):
    """Magnitude pruning needs no text; the pruned model is really written."""
    model = make_tiny_llama(tmp_path / "model")
    arguments = [f"source={model}", f"target_folder={tmp_path / 'sparse'}", "sparsity='2:4'", "--yes"]
    nemo("llm", "prune", "--factory", "pvs_magnitude", *arguments)
    assert (tmp_path / "sparse" / "model.safetensors").is_file()
    assert (tmp_path / "sparse" / "masks.safetensors").is_file()
