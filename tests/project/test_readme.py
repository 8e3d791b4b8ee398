"""Every command of the documentation is run, or, where it builds an environment or needs a cluster, parsed.

What Slurm would get is rendered in ``cluster/test_launching.py``, NeMo's command is dry-run in
``nemo_cli/test_factories.py``.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from nemo_pvs.cli.main import app, main
from nemo_pvs.cli.verbs import VERBS
from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.options import Options
from nemo_pvs.pruning.registry import methods
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.documents import DOCUMENTS, ROOT, blocks, code_spans, commands

COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
SPANS = [span for document in DOCUMENTS for span in code_spans(document)]
# Programs that are not ours: what they are given is not checked here.
FOREIGN = (
    "git clone",
    "python3.11 -m venv",
    "PIP_CONSTRAINT= python -m pip install",
    ".venv-gpu/bin/pip install",
    "docker ",
    "enroot import",
    "export ",
    "hf download",
    "sbatch ",
    "llama-completion ",
    ".venv/bin/pre-commit install",
)


def _run(command: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code in (0, None), said.err
    return said.out


@pytest.fixture
def small_parent(tmp_path, monkeypatch) -> None:
    """Go to a folder with a model of three layers, wide enough for the sizes in the README, in place of SmolLM2."""
    pytest.importorskip("gensim")
    sizes = {"num_hidden_layers": 3, "hidden_size": 320, "intermediate_size": 800, "max_position_embeddings": 512}
    save_tiny_tokenizer(make_tiny_llama(tmp_path / "MODEL", **sizes))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_one_liners_run_as_they_stand(small_parent, monkeypatch, capsys):
    one_liners = [line for line in commands(ROOT / "README.md") if "SMALLER" in line]
    assert [line.split()[1] for line in one_liners] == ["prune", "convert", "inspect", "evaluate"]
    said = [_run(line.replace("smollm2-135m", "MODEL"), monkeypatch, capsys) for line in one_liners]
    assert Path("SMALLER-nemo/weights/.metadata").exists()
    assert "SMALLER and SMALLER-nemo have equal logits on 1,024 tokens" in said[1]
    assert "SMALLER-nemo" in said[3]


@pytest.mark.slow
def test_the_python_example_runs_as_it_stands(small_parent):
    (example,) = blocks(ROOT / "README.md", "python")
    exec(compile(example.replace("smollm2-135m", "MODEL"), "README.md", "exec"), {})
    assert Path("SMALLER-nemo/weights/.metadata").exists()


def test_advice_is_what_the_readme_shows(monkeypatch, capsys):
    (command,) = [line for line in commands(ROOT / "README.md") if line.startswith("pvs advise")]
    said = [line.rstrip() for line in _run(command, monkeypatch, capsys).strip().splitlines()]
    assert "\n".join(said) in [block.strip() for block in blocks(ROOT / "README.md", "text")]


def test_every_command_is_understood():
    """Each is one that another test runs, that the parser of ``pvs`` takes, or that ``make`` or Python knows."""
    assert len(COMMANDS) > 40
    program = typer.main.get_command(app)
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "torchrun":
            words = words[words.index("pvs") :]
        if Path(words[0]).name == "pvs":
            # Parses options, their types and arguments, and runs nothing.
            program.commands[words[1]].make_context(words[1], words[2:])
        elif words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=True)
        else:
            assert words[0] == "nemo" or command.startswith(FOREIGN), f"nothing checks the command: {command}"


def test_every_verb_and_option_in_the_text_exists():
    verbs = {verb.__name__: verb.__annotations__ for verb in VERBS}
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    for command in re.findall(r"(?<!_)(?<!nemo )\bpvs ([a-z]+[^`\n]*)", text):
        verb, *rest = command.replace("...", "").split()
        verb = verb.replace("-", "_")
        if verb not in verbs:
            raise AssertionError(f"pvs {verb} is in a document but not in the program")
        for option in re.findall(r"--([a-z-]+)", " ".join(rest)):
            assert option.replace("-", "_") in verbs[verb], f"pvs {verb} has no --{option}"


def test_every_benchmark_in_the_text_exists():
    modules = {module for span in SPANS for module in re.findall(r"python -m (tests\.[\w.]+)", span)}
    assert len(modules) > 10
    assert not [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()]


def test_every_path_in_the_text_exists():
    folders = ("nemo_pvs/", "tests/", "recipes/", "conversions/", "launch/", "docs/")
    paths = {span for span in SPANS if span.startswith(folders) and not re.search(r"[<>\s]", span)}
    assert len(paths) > 30
    assert not [path for path in paths if not any(ROOT.glob(path))]
    # The pages that walk through the packages leave nemo_pvs/ out.
    files = {span for span in SPANS if re.fullmatch(r"[\w/]+/\w+\.py", span)} - paths
    assert not [file for file in files if not (ROOT / "nemo_pvs" / file).is_file()]


def test_every_module_in_the_text_exists():
    modules = {module for span in SPANS for module in re.findall(r"\bnemo_pvs(?:\.[a-z]\w*)+", span)}
    assert modules
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("document", ["README.md", "docs/methods.md"])
def test_every_method_has_a_row_that_says_what_its_registration_says(document):
    tables = (ROOT / document).read_text().split("\n\n")
    _, _, *rows = next(table for table in tables if "| `shortgpt` |" in table).splitlines()
    row_of = {name: row for row in rows for name in re.findall(r"`([a-z-]+)`", row.split(" | ")[0])}
    assert sorted(row_of) == sorted(methods())
    for name, row in row_of.items():
        assert f"| {_needs(methods()[name])} |" in row, name
        assert methods()[name].paper in row, name


def _needs(method: PruningMethod) -> str:
    if method.trains:
        return "training (`pvs run`)"
    if method.scored:
        return "scores with gradients" if method.gradients else "scores"
    return "text" if method.reads_text else "nothing"


def test_the_options_of_methods_are_those_that_they_declare():
    table = _options_table()
    assert table in (ROOT / "docs" / "methods.md").read_text(), f"docs/methods.md lacks this table:\n{table}"


def _options_table() -> str:
    """Return every option with its methods, its default and what it is."""
    methods_of: dict[tuple[str, str, str], list[str]] = {}
    for method in methods().values():
        for name, field in method.options.model_fields.items():
            row = (Options.spelt(name, "--{}"), _default(field.default), str(field.description))
            if row[0] != "--target":
                methods_of.setdefault(row, []).append(f"`{method.name}`")
    rows = ["| option | of | default | meaning |", "|-|-|-|-|"]
    for (option, default, meaning), names in sorted(methods_of.items()):
        rows.append(f"| `{option}` | {', '.join(names)} | {default} | {meaning} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def test_every_verb_is_described():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert not [verb.__name__ for verb in VERBS if f"| `pvs {verb.__name__.replace('_', '-')}" not in text]


def test_contributing_shows_the_order_that_import_linter_checks():
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert contract
    order = [sorted(row.split(" | ")) for row in re.findall(r'"(.*)"', contract[1])]
    rows = re.findall(r"^\| (`nemo_pvs/.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [sorted(re.findall(r"nemo_pvs/(\w+)", row)) for row in rows] == order


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    prose = re.sub(r"^```.*?^```$", "", "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n{2,}", prose):
        assert paragraph.startswith(("|", "- ")) or paragraph.count("\n") < 4, paragraph


def test_the_way_to_a_cluster_makes_what_its_recipes_read():
    """Every parent, tokenizer and token file of a recipe on the page comes out of a command above it."""
    made: list[str] = []
    seen = []
    for command in commands(ROOT / "launch" / "README.md"):
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
    assert {*named} - {"my/recipe", "runs/demo"} <= {*known}


def test_the_batch_script_is_valid_bash():
    for script in (ROOT / "launch").glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_links_point_at_files():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            # Files that a page includes are linked from the page's place.
            places = [document.parent, ROOT / "docs"]
            assert any((place / link).exists() for place in places), f"{document.name} links to {link}"


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
