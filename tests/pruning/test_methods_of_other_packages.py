"""Another package adds a method by an entry point: the command, its help, and a recipe have it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from nemo_pvs.system.files import read_json
from tests.conftest import make_tiny_llama
from tests.documents import blocks
from tests.forked_commands import ForkedCommands, forked_commands
from tests.pipeline.test_pipeline import tiny_values

TOY = '''
"""A toy method: the last layers go."""

from __future__ import annotations

from nemo_pvs.pruning.method import Expected, PruningMethod
from nemo_pvs.pruning.methods.steps import planned
from nemo_pvs.pruning.options import Options, Positive, option


class ToyOptions(Options):
    """The options of the toy method."""

    amounts = ("last",)

    last: Positive | None = option("layers to remove at the output")
    keep_one_more: bool = option("remove one less", False)


def _target(options, parent):
    removed = options.last - options.keep_one_more
    return parent.replace(layers=parent.layers - removed)


def _prune(request):
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.pruning.structured.depth import layer_plan

    parent = shape_of(request.source)
    left = _target(request.options, parent).layers
    return planned(request, layer_plan(parent, range(left, parent.layers), "toy", {}))


METHOD = PruningMethod(
    name="toy",
    removes="the last layers",
    options=ToyOptions,
    prune=_prune,
    expected=lambda options, parent: Expected(_target(options, parent), exact=True),
    reads_text=False,
)
'''


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedCommands]:
    """Run Python where two packages are installed as pip does it: the toy, and the one of the documentation."""
    folder = tmp_path_factory.mktemp("toy")
    site = install(folder / "site-packages", "toy.py", TOY, "toy:METHOD")
    (example,) = blocks(Path(__file__).parents[2] / "docs" / "add-a-method.md", "python")
    install(site, "last_layers.py", example, "last_layers:METHOD")
    with forked_commands(folder / "outputs", "nemo_pvs.api.prune", environment=environment(site)) as run:
        yield run


def install(site: Path, module: str, code: str, entry: str) -> Path:
    name = module.removesuffix(".py")
    about = site / f"{name}_method-1.0.dist-info"
    about.mkdir(parents=True)
    (site / module).write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}-method\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[nemo_pvs.methods]\n{name.replace('_', '-')} = {entry}\n")
    return site


def environment(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{site}{os.pathsep}{Path.cwd()}", "COLUMNS": "200"}


@pytest.mark.slow
def test_the_command_has_it_with_its_options(python: ForkedCommands, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    pvs = ("-m", "nemo_pvs.cli")
    done = python(*pvs, "prune", model, tmp_path / "small", "--method", "toy", "--last", 3, "--keep-one-more")
    assert done.code == 0, done.errors
    assert "2 layers" in done.output
    for refused, sentence in (
        (("--last", 0), "--last is 0; it should be greater than or equal to 1."),
        (("--ratio", 0.5), "toy has no --ratio; its options are --last, --keep-one-more."),
    ):
        done = python(*pvs, "prune", model, tmp_path / "other", "--method", "toy", *refused)
        assert (done.code, done.errors) == (2, f"pvs: {sentence}\n")
    assert "layers to remove at the output" in python(*pvs, "prune", "--help").output
    assert "the last layers" in python(*pvs, "methods").output


@pytest.mark.slow
def test_a_recipe_has_it(python: ForkedCommands, tmp_path: Path) -> None:
    values = tiny_values(tmp_path)
    values["targets"] = {"toy": {"method": "toy", "last": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    script = dedent(
        f"""
        from pathlib import Path
        from nemo_pvs.checkpoints.open import open_source
        from nemo_pvs.checkpoints.source import shape_of
        from nemo_pvs.pipeline.pipeline import Pipeline
        from nemo_pvs.planning.dry_run import dry_run
        from nemo_pvs.recipe.load import load_recipe

        recipe = load_recipe({str(tmp_path / "recipe.yaml")!r})
        (planned,) = dry_run(recipe).targets
        assert (planned.expected.shape.layers, planned.expected.exact) == (3, True)
        pipeline = Pipeline(recipe, Path({str(tmp_path / "run")!r}))
        pipeline.prepare_only()
        assert shape_of(open_source(pipeline.pruned("toy") / "huggingface")).layers == 3
        """
    )
    done = python("-c", script)
    assert done.code == 0, done.errors


@pytest.mark.slow
def test_the_method_of_the_documentation_prunes(python: ForkedCommands, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    command = ("prune", model, tmp_path / "small", "--method", "last-layers", "--last", 3)
    done = python("-m", "nemo_pvs.cli", *command)
    assert done.code == 0, done.errors
    left = read_json(model / "config.json")["num_hidden_layers"] - 3
    assert read_json(tmp_path / "small" / "config.json")["num_hidden_layers"] == left > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("METHOD = 1", "it is not a nemo_pvs.pruning.method.PruningMethod"),
        ("import nowhere", "it cannot be loaded (ModuleNotFoundError: No module named 'nowhere')"),
        (TOY.replace('name="toy"', 'name="flap"'), "there already is a method flap"),
    ],
    ids=["another object", "it does not import", "the name of another"],
)
def test_one_that_is_broken_is_left_out_and_named(tmp_path: Path, code: str, why: str) -> None:
    site = install(tmp_path / "site-packages", "toy.py", code, "toy:METHOD")
    command = [sys.executable, "-W", "ignore", "-m", "nemo_pvs.cli", "methods"]
    done = subprocess.run(
        command, env={**os.environ, **environment(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    said = f"The method toy of the package toy-method is left out: {why}; repair or uninstall the package."
    assert said in done.stdout + done.stderr
    assert "the last layers" not in done.stdout
    assert "KV groups and FFN channels by fluctuation" in done.stdout
