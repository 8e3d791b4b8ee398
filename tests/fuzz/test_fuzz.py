"""A hundred cases; ``make test-full`` runs a thousand, ``make fuzz`` ten thousand."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from nemo_pvs.errors import UserError
from tests.conftest import cases
from tests.fuzz.harness import Subject, Workshop
from tests.fuzz.subjects import SUBJECTS

_CASES = cases(10)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_damaged_inputs_are_refused_in_a_sentence_or_read(workshop: Workshop, name: str) -> None:
    done = sum(workshop.run(name, SUBJECTS[name], seed) for seed in range(_CASES))
    assert done < _CASES, "nothing that this damages is looked at"


def test_the_same_seed_is_the_same_case(workshop: Workshop, tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        SUBJECTS["index"].make(folder)
        SUBJECTS["index"].damage(Random("index 5"), folder)
        made.append({path.name: path.read_bytes() for path in (folder / "model").glob("*.json")})
    assert made[0] == made[1]


@pytest.mark.parametrize("fault", ["traceback", "left behind", "more than a sentence", "memory", "check"])
def test_the_fuzz_sees_what_it_is_for(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """With faults put into a command; without one it is refused as it should be."""
    from nemo_pvs.cli import main

    def faulty(arguments: list[str], standalone_mode: bool) -> None:
        out = Path(arguments[-1])
        if fault == "traceback":
            raise KeyError("a bug")
        if fault == "left behind":
            out.mkdir()
            raise UserError("No.")
        if fault == "more than a sentence":
            raise UserError("No.\nReally.")
        if fault == "memory":
            bytearray(4 << 30)

    def check(sound: Path, out: Path) -> None:
        assert fault != "check", "wrong result"

    subject = Subject(
        make=lambda folder: None,
        damage=lambda random, folder: None,
        command=lambda random, folder, out: ["inspect", folder / "absent"],
        check=check,
    )
    assert not workshop.run("sound", subject, 0)
    monkeypatch.setattr(main, "app", faulty)
    expected = {"traceback": "a bug", "memory": "MemoryError", "check": "wrong result"}.get(fault, fault)
    with pytest.raises(AssertionError, match=r"python -m tests\.fuzz faulty --seed 7") as caught:
        workshop.run("faulty", subject, 7)
    assert expected in str(caught.value)
