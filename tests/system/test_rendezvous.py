"""Variables of a cluster that no torchrun has set: one sentence that names them, and no waiting for ever."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.system import ranks
from nemo_pvs.system.rendezvous import rank_environment
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

_NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
_POD = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for name in (*_NAMES, "PVS_RENDEZVOUS_SECONDS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but these are not set: RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", **_POD}, "WORLD_SIZE is 2, but these are not set: MASTER_PORT"),
        ({"WORLD_SIZE": "2", **_POD, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"WORLD_SIZE": "2", **_POD, "MASTER_PORT": "1", "RANK": "2"}, "RANK is '2', not a number below 2"),
        ({"WORLD_SIZE": "2", **_POD, "MASTER_PORT": "1", "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"WORLD_SIZE": "2", **_POD, "MASTER_PORT": "1", "PVS_RENDEZVOUS_SECONDS": "soon"}, "SECONDS is 'soon'"),
    ],
)
def test_variables_that_make_no_sense_are_named(monkeypatch, values, said):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for on_gpus in (False, True):
        with pytest.raises(UserError, match=said), ranks.joined(on_gpus=on_gpus):
            pytest.fail("joined what is not there")


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"RANK": "1", "LOCAL_RANK": "x"}])
def test_one_rank_is_alone(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert rank_environment() is None
    with ranks.joined(), ranks.joined(on_gpus=True):
        assert ranks.world_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_never_come_are_not_waited_for_for_ever(monkeypatch, capsys, port, rank):
    values = {**_POD, "WORLD_SIZE": "2", "RANK": rank, "MASTER_PORT": port, "PVS_RENDEZVOUS_SECONDS": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"Rank {rank} of 2 \(RANK and WORLD_SIZE\) .* within 1 s"), ranks.joined():
        pytest.fail("joined what is not there")
    assert time.monotonic() - began < 20
    assert f"waiting up to 1 s for the others at 127.0.0.1:{port}" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_that_a_cluster_has_started_one_by_one_meet(port):
    code = "from nemo_pvs.system import ranks; import torch\n"
    code += "with ranks.joined(): print(int(ranks.all_reduce(torch.tensor(ranks.rank() + 1))))"
    pod = {**_POD, "WORLD_SIZE": "2", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**pod, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split()[-1] for process in started]
    assert said == ["3", "3"]


def test_every_verb_of_several_ranks_says_it(pvs, monkeypatch, tmp_path):
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 " * 200)
    text = ("--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32)
    assert pvs("calibrate", model, *text, "--out", tmp_path / "scores").code == 0
    budget = ("--parameters", 8e4, "--tolerance", 0.9)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (
        ("prune", model, tmp_path / "o", "--method", "minitron-width", "--target", "hidden=16", *text),
        ("calibrate", model, *text, "--out", tmp_path / "o"),
        ("calibrate", model, *text, "--out", tmp_path / "o", "--gradients", "--tensor-parallel", 2),
        ("search", model, "--scores", tmp_path / "scores", *budget, "--out", tmp_path / "o"),
        ("evaluate", model, "--perplexity", tmp_path / "text.txt", "--out", tmp_path / "o"),
    ):
        done = pvs(*command)
        assert (done.code, "The variable WORLD_SIZE is 2, but" in done.errors) == (2, True), done
    assert sorted(tmp_path.rglob("*")) == before
