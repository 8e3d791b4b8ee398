"""``~`` in paths: on the command line, in recipes and in launch profiles."""

from __future__ import annotations

import pytest
import yaml

from nemo_pvs.cluster.profile import load_profile
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.system.files import expand_home
from tests.conftest import make_tiny_llama


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "{home}"),
        ("~/x", "{home}/x"),
        ("--out=~/x", "--out={home}/x"),
        ("ARM=~/x", "ARM={home}/x"),
        ("~/x,~/y", "{home}/x,{home}/y"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
        ("a~/x", "a~/x"),
        ("/x/~/y", "/x/~/y"),
        ("x~y", "x~y"),
        ("hf://owner/name", "hf://owner/name"),
        (3, 3),
    ],
)
def test_the_home_directory_is_written_out_where_a_path_begins(home, given, meant):
    assert expand_home(given) == (meant.format(home=home) if isinstance(meant, str) else meant)


def test_on_the_command_line(home, pvs):
    make_tiny_llama(home / "model")
    done = pvs("convert", "~/model", "~/made", "--to", "hf")
    assert done.code == 0, done.errors
    assert (home / "made" / "model.safetensors").is_file()
    assert pvs("inspect", "~/made").code == 0
    assert "home/none does not exist" in pvs("inspect", "~/none").errors


def test_in_recipes_and_in_what_they_extend(home, tmp_path):
    demo = load_recipe("smollm2_135m/demo")
    files = {"train": ["~/a", "/b"], "validation": "~/v", "calibration": "~/c", "test": "~/t"}
    values = {
        **demo.model_dump(exclude_unset=True, mode="json"),
        "parent": {"source": "~/parent"},
        "data": {"token_files": files},
    }
    (home / "base.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "mine.yaml").write_text("extends: ~/base.yaml\nname: mine\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.parent.source == f"{home}/parent"
    assert recipe.data.token_files.train == [f"{home}/a", "/b"]
    assert recipe.data.token_files.test == f"{home}/t"


def test_in_launch_profiles(home, tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: local\npython: ~/env/bin/python\n")
    assert load_profile(str(tmp_path / "mine.yaml")).python == f"{home}/env/bin/python"
