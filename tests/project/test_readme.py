"""Every command of the documentation is run, or, where it builds an environment or needs a cluster, parsed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_pvs.cli.main import main
from nemo_pvs.cli.verbs import VERBS
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "conversions" / "README.md",
]


def _commands(document: Path) -> list[str]:
    """Return the lines of fenced blocks without their comments."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_one_liners_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """In place of SmolLM2 there is a model of three layers that is wide enough for the sizes in the README."""
    pytest.importorskip("gensim")
    sizes = {"num_hidden_layers": 3, "hidden_size": 320, "intermediate_size": 800, "max_position_embeddings": 512}
    save_tiny_tokenizer(make_tiny_llama(tmp_path / "MODEL", **sizes))
    monkeypatch.chdir(tmp_path)
    commands = [line for line in _commands(ROOT / "README.md") if line.startswith("pvs ")]
    assert [line.split()[1] for line in commands] == ["prune", "convert", "inspect", "evaluate"]
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command.replace("smollm2-135m", "MODEL")))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None), capsys.readouterr().err
    assert (tmp_path / "SMALLER-nemo" / "weights" / ".metadata").exists()
    assert "logits differ by" in (said := capsys.readouterr().out)
    assert "SMALLER-nemo" in said


def test_every_verb_and_option_in_the_documents_exists():
    verbs = {verb.__name__: verb.__annotations__ for verb in VERBS}
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    for command in re.findall(r"(?<!_)(?<!nemo )\bpvs ([a-z]+[^`\n]*)", text):
        verb, *rest = command.replace("...", "").split()
        verb = verb.replace("-", "_")
        if verb not in verbs:
            raise AssertionError(f"pvs {verb} is in a document but not in the program")
        for option in re.findall(r"--([a-z-]+)", " ".join(rest)):
            assert option.replace("-", "_") in verbs[verb], f"pvs {verb} has no --{option}"


def test_the_way_to_a_cluster_makes_what_its_recipes_read():
    """Every parent, tokenizer and token file of a recipe on the page comes out of a command above it."""
    made: list[str] = []
    seen = []
    for command in _commands(ROOT / "launch" / "README.md"):
        if found := re.match(r"pvs run (llama\S+) --launch \S+( --dry-run)?$", command):
            recipe = load_recipe(found[1])
            seen.append(recipe.name)
            assert recipe.data.token_files is not None
            _, files = recipe.data.token_files.blend
            for path in (recipe.parent.source or recipe.parent.tokenizer, *files, recipe.data.token_files.test):
                assert any(str(path).startswith(folder) for folder in made), f"{recipe.name} reads {path}"
            made.append(f"runs/{recipe.name}/models" if not found[2] else "nothing: that was a dry run")
        made += re.findall(r"--(?:local-dir|out) (\S+)", command)
    assert seen == ["llama31_8b_p200", "llama31_8b_p200", "llama31_8b_minitron_width"]


def test_every_recipe_in_the_documents_exists():
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    known = packaged_recipes()
    named = re.findall(r"pvs (?:run|recipes|budget) ([a-z0-9_]+/[a-z0-9_]+)\b", text)
    assert len(named) > 5
    assert {*named} - {"my/recipe"} <= {*known}


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_knows_the_documented_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_batch_script_is_valid_bash():
    for script in (ROOT / "launch").glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_links_point_at_files():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_pins_are_the_known_good_ones():
    """The versions that were proved to work together; the list lies outside the project."""
    known = ROOT.parent / "shared" / "spec" / "known-good-pins.txt"
    if not known.exists():
        pytest.skip("no list of known good versions beside the project")

    def pins(path: Path) -> dict[str, str]:
        lines = (line.split(";")[0].strip() for line in path.read_text().splitlines() if "==" in line)
        return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}

    ours, theirs = pins(ROOT / "constraints.txt"), pins(known)
    assert {name: version for name, version in ours.items() if theirs.get(name, version) != version} == {}
