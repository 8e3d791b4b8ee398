"""``pvs train`` as a user runs it: from a pruned checkpoint and a folder of tokens to a model with its ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.cli.verbs import prune, tokenize, train
from nemo_pvs.data.token_files import token_file_hash
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.training.job import JOB_FILE, TrainingJob
from nemo_pvs.training.prepare import prepare_job
from tests.conftest import make_tiny_llama, save_tiny_tokenizer


@pytest.mark.parallel
@pytest.mark.slow
def test_tokenize_prune_train_convert(tmp_path: Path, forked_launcher: None) -> None:
    model = str(save_tiny_tokenizer(make_tiny_llama(tmp_path / "model")))
    for index in range(8):
        words = " ".join(f"w{2 + (index + place) * 7 % 125}" for place in range(600))
        (tmp_path / f"{index}.txt").write_text(words)
    data, short, out = (str(tmp_path / name) for name in ("data", "short", "run"))
    tokenize([str(tmp_path / f"{index}.txt") for index in range(8)], model, data, split="train=0.7,validation=0.3")
    prune(
        model,
        short,
        "minitron-depth",
        target="layers=3",
        data=f"{data}/train.bin",
        samples=4,
        sequence_length=32,
        parent_tokens=1e6,
    )
    train(
        short,
        out,
        data,
        tokens=3 * 8 * 32,
        sequence_length=32,
        global_batch_size=8,
        micro_batch_size=2,
        validation_samples=8,
        learning_rate=1e-3,
        first_token=700,
    )
    job = TrainingJob.load(Path(out) / JOB_FILE)
    assert job.first_token == 3 * 8 * 32, "700 is in the third step"
    ledger = Ledger.load(Path(out) / LEDGER)
    assert [charge.activity for charge in ledger.charges] == ["parent pretraining", "search", "training"]
    assert ledger.training.tokens == 3 * 8 * 32
    assert ledger.charges[-1].steps == 3
    checkpoint = Path(out) / "nemo" / "checkpoints" / "step=2-last"
    convert(checkpoint, tmp_path / "trained", to="hf")
    assert Ledger.load(tmp_path / "trained" / LEDGER).charges == ledger.charges
    assert shape_of(open_source(tmp_path / "trained")).layers == 3

    # What is pruned from it knows what was read, and reads it again only if somebody says so.
    smaller = str(tmp_path / "smaller")
    prune(str(tmp_path / "trained"), smaller, "magnitude", sparsity="0.5")
    (read,) = Ledger.load(Path(smaller) / LEDGER).read
    assert (read.data, read.seed, read.first, read.end) == (token_file_hash(Path(data) / "train"), 1234, 768, 1536)
    again = {"tokens": 256, "sequence_length": 32, "global_batch_size": 8, "validation_samples": 8}
    with pytest.raises(UserError, match="--first-token 1536, or read them again with --allow-overlap"):
        train(smaller, str(tmp_path / "again"), data, first_token=1024, **again)
    with pytest.raises(UserError, match="give a whole number of 0 or more"):
        train(smaller, str(tmp_path / "again"), data, first_token=-1, **again)
    assert not (tmp_path / "again").exists()
    training, layout = job.training.model_copy(update={"tokens": 256.0}), job.layout
    for first in (0, 1536):
        prepared = prepare_job(
            smaller,
            tmp_path / f"from-{first}",
            Path(data),
            layout,
            training,
            random_init=False,
            first_token=first,
            before=[read],
        )
        assert prepared.first_token == first
