"""NeMo's own command with this package as an installed plugin: from a wheel, in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import make_tiny_llama
from tests.forked_commands import forked_commands

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


@pytest.fixture(scope="module")
def nemo(installed, tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Run the ``nemo`` script as somebody would who has installed the wheel, outside of the checkout.

    Each command is forked from a process that has imported NeMo, and nothing of ours.
    """
    environment = {
        # In front of another NeMo that is being tested (make test-nemo-2.6), if there is one.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(installed), os.environ.get("PYTHONPATH")))),
        "COLUMNS": "250",
        "NEMORUN_HOME": str(installed / "home"),
        # What launch/README.md asks for on a machine with the CUDA toolkit and no device; it means nothing elsewhere.
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    script = Path(sys.executable).with_name("nemo")
    folder = tmp_path_factory.mktemp("commands") / "outputs"
    with forked_commands(folder, "nemo.collections.llm", cwd=installed, environment=environment) as run:

        def nemo(*arguments: object, **variables: str) -> str:
            done = run(script, *arguments, **variables)
            assert done.code == 0, done.output[-2000:] + done.errors[-2000:]
            return done.output

        yield nemo


def test_the_wheel_holds_recipes_profiles_and_tables(installed):
    for name in (
        "recipes/llama31_8b/base.yaml",
        "launch/slurm_h100.yaml",
        "launch/slurm.sbatch",
        "launch/tokenize.sbatch",
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
