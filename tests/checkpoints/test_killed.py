"""A conversion that is killed at any moment leaves nothing that looks finished, and the next one works."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nemo_pvs.api.prune import prune
from nemo_pvs.checkpoints.convert import convert, verify_checkpoint
from nemo_pvs.checkpoints.manifest import ORIGIN
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.model.megatron_run import latest_checkpoint
from nemo_pvs.pruning.result import PLAN, SETTINGS
from nemo_pvs.system.folder_lock import locked_target
from tests.checkpoints.gguf_writer import MERGING_TOKENIZER
from tests.checkpoints.test_gguf_tokenizer import tokenizer_of
from tests.conftest import cases, make_tiny_llama, save_tiny_tokenizer

CHILD = """
import os, sys
from pathlib import Path
import torch
from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.gguf.write import write_gguf
from nemo_pvs.checkpoints.open import open_source
torch.set_num_threads(1)
for line in iter(sys.stdin.readline, ""):
    source, target, to, *options = line.split()
    child = os.fork()
    if not child:
        code = 1
        try:
            if to == "gguf":
                write_gguf(open_source(source), Path(target))
            else:
                convert(source, target, to=to, overwrite="overwrite" in options)
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until it is waited for, a dead child keeps its number
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Converter:
    """Processes that convert, forked from one that has done its imports, so that they begin at once."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, source, target, *, to, overwrite=False, kill_after=None, kill_when=None):
        """Return the exit code, or minus the signal's number, and the seconds that it took."""
        print(source, target, to, "overwrite" if overwrite else "", file=self.server.stdin, flush=True)
        child = int(self.server.stdout.readline())
        begun = time.monotonic()
        try:
            if kill_after is not None:
                time.sleep(kill_after)
            while kill_when and not kill_when():
                assert time.monotonic() < begun + 60
            if kill_after is not None or kill_when:
                os.kill(child, signal.SIGKILL)
        finally:
            print(file=self.server.stdin, flush=True)
            code = int(self.server.stdout.readline())
        return code, time.monotonic() - begun


@pytest.fixture(scope="module")
def converter():
    made = Converter()
    yield made
    made.server.stdin.close()
    made.server.stdout.close()
    made.server.wait(timeout=60)


@pytest.fixture
def many_tensors(tmp_path):
    sizes = {"num_hidden_layers": 40, "hidden_size": 96, "intermediate_size": 160, "vocab_size": 260}
    folder = make_tiny_llama(tmp_path / "many", **sizes, max_shard_size="3MB")
    scratch = tmp_path / "tokenizer"
    scratch.mkdir()
    tokenizer_of(scratch, **MERGING_TOKENIZER).save_pretrained(folder)
    ledger = Ledger()
    ledger.charge("training", 1000, shape_of(open_source(folder)), 16, training=True)
    ledger.save(folder / LEDGER)
    (folder / ORIGIN).write_text('{"recipe": 1}')
    assert sum(path.stat().st_size for path in folder.iterdir()) > 10_000_000
    return folder


def verified(target):
    """Return what must be the same whenever a target is made: tensors, other files, and what was added to them."""
    if target.is_file():
        return target.read_bytes()
    checkpoint = latest_checkpoint(target)
    return verify_checkpoint(target), *((checkpoint / name).read_text() for name in (LEDGER, ORIGIN))


TARGETS = {"hf": "out", "nemo": "out", "megatron": "out", "gguf": "out.gguf"}


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
def test_killed_at_random_moments(converter, many_tensors, tmp_path, to):
    """No target, or a sound one; and the next run makes what an undisturbed one makes."""
    source, target = many_tensors, tmp_path / TARGETS[to]
    if to == "hf":
        source = tmp_path / "nemo"
        convert(many_tensors, source, to="nemo", verify="none")
    code, seconds = converter.run(source, target, to=to)
    assert code == 0
    expected = verified(target)
    remove(target)
    generator = random.Random(0)
    killed = unfinished = 0
    for _ in range(cases(5)):
        code, _ = converter.run(source, target, to=to, kill_after=generator.uniform(0, 0.9 * seconds))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if not target.exists():
            unfinished += 1
            assert converter.run(source, target, to=to)[0] == 0
        assert verified(target) == expected
        with locked_target(target):  # the next command removes the lock of one that died before it could
            pass
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == [target.name]
        remove(target)
    assert killed >= cases(5) / 3
    assert unfinished >= 1


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
def test_killed_when_the_target_appears(converter, many_tensors, tmp_path, to):
    """Nothing is left to be done then: the target has been verified and has its ledger."""
    target = tmp_path / TARGETS[to]
    assert converter.run(many_tensors, target, to=to)[0] == 0
    expected = verified(target)
    remove(target)
    converter.run(many_tensors, target, to=to, kill_when=target.exists)
    assert verified(target) == expected


@pytest.mark.parametrize(
    ("method", "options", "record"),
    [
        ("magnitude", {"sparsity": 0.5}, SETTINGS),
        ("shortgpt", {"layers": 3, "samples": 2, "sequence_length": 16}, PLAN),
    ],
)
def test_a_pruned_model_is_renamed_when_it_has_its_ledger_and_record(tmp_path, monkeypatch, method, options, record):
    parent, target = save_tiny_tokenizer(make_tiny_llama(tmp_path / "parent")), tmp_path / "out"
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8 " * 100)
    renamed, replace = [], os.replace

    def watched(source, name):
        if name == target:
            renamed.append({path.name for path in source.iterdir()})
        replace(source, name)

    monkeypatch.setattr(os, "replace", watched)
    prune(parent, target, method, data=tmp_path / "text.txt", **options)
    assert renamed == [{path.name for path in target.iterdir()}]
    assert {LEDGER, record, "pvs_manifest.json"} <= renamed[0]


def remove(target):
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()


@pytest.mark.slow
def test_killed_while_it_replaces_another_model(converter, make_tiny_llama, tmp_path):
    """The old model or the new one or none, but never a part; a clutter of files makes the moment last."""
    target = tmp_path / "out"
    old = convert(make_tiny_llama(tmp_path / "one", seed=1), target, to="nemo")
    clutter = target / "notes"
    clutter.mkdir()
    for index in range(5000):
        (clutter / str(index)).touch()
    make_tiny_llama(tmp_path / "other", seed=2)

    def is_touched():
        return not clutter.exists() or len(os.listdir(clutter)) < 5000

    code, _ = converter.run(tmp_path / "other", target, to="nemo", overwrite=True, kill_when=is_touched)
    assert code == -signal.SIGKILL
    left = verify_checkpoint(target) if target.exists() else None
    assert left is None or left != old, "the old model looks whole, but some of its files are gone"
    assert converter.run(tmp_path / "other", target, to="nemo", overwrite=True)[0] == 0
    new = convert(tmp_path / "other", tmp_path / "again", to="nemo")
    assert left in (None, new)
    assert verify_checkpoint(target) == new != old
    assert not list(tmp_path.glob(".out*"))
