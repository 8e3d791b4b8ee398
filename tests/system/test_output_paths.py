"""A path that cannot be written is refused in a sentence, by every verb that writes, before anything else is done."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_pvs.cli.verbs import VERBS
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_file, check_new_folder, whole_folder, write_text
from nemo_pvs.system.output_paths import check_file, check_folder

# Sources do not exist and text is missing: who looks at them before the target says something else.
FOLDER_VERBS: dict[str, Callable[[Path], list[object]]] = {
    "convert": lambda out: ["convert", "absent", out],
    "tokenizer": lambda out: ["tokenizer", "absent.txt", "--vocab", "300", "--out", out],
    "tokenize": lambda out: ["tokenize", "absent.txt", "--tokenizer", "absent", "--out", out],
    "calibrate": lambda out: ["calibrate", "absent", "--out", out],
    "prune": lambda out: ["prune", "absent", out, "--method", "flap", "--ratio", "0.5"],
    "train": lambda out: ["train", "absent", out, "--data", "absent", "--tokens", "1e6"],
    "teach": lambda out: ["teach", "absent", "--out", out, "--data", "absent", "--tokens", "1e6"],
    "evaluate": lambda out: ["evaluate", "absent", "--out", out],
    "run": lambda out: ["run", "smollm2_135m/demo", "--out", out],
    "report": lambda out: ["report", "absent", "--out", out],
}
FILE_VERBS: dict[str, Callable[[Path], list[object]]] = {
    "search": lambda out: ["search", "absent", "--scores", "absent", "--parameters", "1e8", "--out", out],
    "scaling_fit": lambda out: ["scaling-fit", "published", "--out", out],
}
READ_ONLY_VERBS = {"doctor", "inspect", "methods", "recipes", "budget", "scaling_predict", "advise"}


def _below_a_file(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "file").write_text("keep me")
    return tmp_path / "file" / "deep" / "out", r"file is a file, not a folder"


def _dangling_link(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    return tmp_path / "link", r"link is a link to \S+gone/x, which does not exist"


def _below_a_dangling_link(tmp_path: Path) -> tuple[Path, str]:
    target, message = _dangling_link(tmp_path)
    return target / "out", message


def _link_to_itself(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    return tmp_path / "link" / "out", r"link"


def _long_name(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / ("n" * 240) / "out", r"Cannot write"


def _long_last_name(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / ("n" * 240), r"a name in this path is too long"


def _long_path(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path.joinpath(*["n" * 200] * 25), r"File name too long"


KINDS = [_below_a_file, _dangling_link, _below_a_dangling_link, _link_to_itself, _long_last_name, _long_path]


def _tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_every_verb_is_here() -> None:
    assert {verb.__name__ for verb in VERBS} == {*FOLDER_VERBS, *FILE_VERBS, *READ_ONLY_VERBS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", [*FOLDER_VERBS, *FILE_VERBS])
def test_a_target_that_cannot_be_made_is_refused_before_any_work(
    pvs: Callable, tmp_path: Path, verb: str, kind: Callable[[Path], tuple[Path, str]]
) -> None:
    target, message = kind(tmp_path)
    before = _tree(tmp_path)
    outcome = pvs(*{**FOLDER_VERBS, **FILE_VERBS}[verb](target))
    assert outcome.code == 2, outcome
    assert outcome.errors.startswith("pvs: Cannot write ")
    assert outcome.errors.count("\n") == 1
    with pytest.raises(UserError, match=message):
        check_folder(target)
    assert _tree(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_a_file_where_a_folder_must_be(pvs: Callable, tmp_path: Path, verb: str) -> None:
    (tmp_path / "out").write_text("keep me")
    outcome = pvs(*FOLDER_VERBS[verb](tmp_path / "out"), *(["--overwrite"] if verb in ("convert", "prune") else []))
    assert (outcome.code, outcome.errors.count("\n")) == (2, 1)
    assert "it is a file, not a folder" in outcome.errors
    assert (tmp_path / "out").read_text() == "keep me"


@pytest.mark.parametrize("verb", FILE_VERBS)
def test_a_folder_where_a_file_must_be(pvs: Callable, tmp_path: Path, verb: str) -> None:
    outcome = pvs(*FILE_VERBS[verb](tmp_path))
    assert (outcome.code, outcome.errors.count("\n")) == (2, 1)
    assert "it is a folder, but a file is needed" in outcome.errors
    assert not list(tmp_path.iterdir())


def test_an_input_whose_name_is_too_long_is_refused_too(pvs: Callable, tmp_path: Path) -> None:
    for arguments in (["convert", "n" * 300, tmp_path / "out"], ["inspect", "n" * 300], ["recipes", "n" * 300]):
        outcome = pvs(*arguments)
        assert (outcome.code, outcome.errors.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


def test_no_permission(tmp_path: Path) -> None:
    """Root may do anything, so a process without its rights looks."""
    folder = tmp_path / "closed"
    folder.mkdir()
    messages = {}
    for mode in (0o500, 0o000):
        folder.chmod(mode)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.chdir(folder)
                if not os.geteuid():
                    os.chown(folder, 65534, 65534)
                    os.setgid(65534)
                    os.setuid(65534)
                check_folder(Path("out"))
            except UserError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        messages[mode] = os.read(reader, 1000).decode()
        os.close(reader)
    folder.chmod(0o700)
    assert "Cannot write out: permission is denied in ." in messages[0o500]
    assert "Cannot write out: Permission denied" in messages[0o000]


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs root to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_read_only_disk(read_only_disk: Path) -> None:
    for check in (check_folder, check_file, check_new_folder, check_new_file):
        with pytest.raises(UserError, match="the file system is read-only"):
            check(read_only_disk / "deep" / "out")


def test_what_can_be_made_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    (tmp_path / ("p" * 255)).mkdir()
    for check in (check_folder, check_file):
        check(tmp_path / "new" / "deep" / "out")
        check(tmp_path / "link" / "out")
        check(tmp_path / ("n" * 200))
        check(tmp_path / ("p" * 255) / "out")
        check(Path("relative"))
    check_folder(tmp_path / "link")
    check_folder(tmp_path)
    check_file(tmp_path / "file")
    for check_new, there in ((check_new_folder, "real"), (check_new_file, "file")):
        check_new(tmp_path / there, overwrite=True)
        with pytest.raises(UserError, match="already exists"):
            check_new(tmp_path / there)
    with pytest.raises(UserError, match="zero byte"):
        check_folder(tmp_path / "a\0b")


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with whole_folder(tmp_path / "link", overwrite=True) as folder:
        write_text(folder / "new", "")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        *("disk", "disk/real", "disk/real/new", "link")
    ]


def test_parents_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    (tmp_path / "was").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "was" / "made" / "out"):
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.rglob("*")] == ["was"]
