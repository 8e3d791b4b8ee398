"""Initial weights of sparse runs: masks come along, and random weights are drawn under them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.masks import CONFIG_KEY, FILE, masks_of, write_masks
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.magnitude import MagnitudeSource
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import read_json, write_json
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.prepare import prepare_job
from nemo_pvs.training.trainer import Trainer
from tests.checkpoints.test_damage import flip_a_bit_of_a_weight
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.masked_source import MaskedSource, RandomMasks
from tests.megatron.ranks import write_tokens


@pytest.fixture(name="sparse")
def sparse_folder(tmp_path) -> Path:
    """A sparse model beside token files."""
    source = MaskedSource(HuggingFaceSource(save_tiny_tokenizer(make_tiny_llama(tmp_path / "dense"))))
    write_huggingface(source, tmp_path / "sparse")
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        write_tokens(tmp_path / "data" / name, list(range(3, 123)) * 10)
    return tmp_path / "sparse"


def _job(sparse: Path, **options) -> TrainingJob:
    training = Training(
        tokens=512, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4, seed=5
    )
    folder = sparse.parent
    return prepare_job(str(sparse), folder / "run", folder / "data", Parallelism(), training, **options)


def _prepare(sparse: Path, **options) -> NemoSource:
    return NemoSource(_job(sparse, **options).initial)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_random_weights_keep_the_masks_of_the_model(sparse, keep):
    initial = _prepare(sparse, random_init=True, keep_parent_embeddings=keep)
    given = HuggingFaceSource(sparse)
    for matrix in matrix_sparsity(initial):
        assert matrix.masked is not None
        assert matrix.disagreements == 0
        assert matrix.zeros == matrix.masked
        assert torch.equal(masks_of(initial).read(matrix.name), masks_of(given).read(matrix.name))
        assert not torch.equal(initial.read(matrix.name), given.read(matrix.name).bfloat16())
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(initial.read(name), given.read(name).bfloat16()) == keep


def test_masks_of_another_model_are_refused_before_anything_is_written(sparse):
    (sparse / FILE).unlink()
    write_masks(RandomMasks(HuggingFaceSource(sparse.parent / "dense"), seed=1), sparse / FILE)
    with ignoring_manifests(), pytest.raises(UserError, match="although its mask says that they are pruned"):
        _prepare(sparse, random_init=False)
    assert not (sparse.parent / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "layout", "sentence"),
    [
        ({}, {"data_parallel": 3}, "global_batch_size 4 is not a multiple of micro_batch_size x data_parallel = 3"),
        ({}, {"pipeline_parallel": 3}, "does not divide 4 layers"),
        ({}, {"sequence_parallel": True}, "sequence_parallel needs tensor_parallel of at least 2"),
        ({}, {"context_parallel": 3}, "6 equal chunks, but 6 does not divide sequence_length 32"),
        ({"sequence_length": 512}, {}, "--sequence-length is 512, but the parent's context ends at 256"),
        ({"tokens": 1e6}, {}, "has 1,200"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(sparse, settings, layout, sentence):
    training = Training(
        **{
            "tokens": 512,
            "sequence_length": 32,
            "global_batch_size": 4,
            "learning_rate": 1e-3,
            "validation_samples": 4,
            **settings,
        }
    )
    folder = sparse.parent
    with pytest.raises(UserError, match=sentence):
        prepare_job(str(sparse), folder / "run", folder / "data", Parallelism(**layout), training, random_init=False)
    assert not (folder / "run").exists()


def test_a_run_begins_with_a_whole_step_and_ends_within_the_data(sparse):
    training = Training(tokens=256, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4)
    folder = sparse.parent

    def first(token: int) -> int:
        more = {"random_init": False, "first_token": token}
        return prepare_job(str(sparse), folder / "run", folder / "data", Parallelism(), training, **more).first_token

    with pytest.raises(UserError, match=r"reads 256 tokens from token 1,024 on, but .*train.bin has 1,200"):
        first(1000)
    assert not (folder / "run").exists()
    assert first(800) == 896
    assert first(896) == 896, "the same run"
    with pytest.raises(UserError, match="holds a run with other settings"):
        first(0)


def test_a_run_goes_on_with_its_own_text_alone(sparse):
    """Its validation may be the same, and Megatron's index of the old text would be read as one of the new."""
    _job(sparse, random_init=False)
    _job(sparse, random_init=False)
    write_tokens(sparse.parent / "data" / "train", list(range(3, 125)) * 10)
    with pytest.raises(UserError, match=r"holds a run on another .*data/train\.bin"):
        _job(sparse, random_init=False)


def test_tokens_of_another_model_are_refused(sparse):
    folder = sparse.parent / "data"
    write_json(folder / "train.json", {"tokenizer_sha256": "f" * 64})
    with pytest.raises(UserError, match=r"train.bin was made with another tokenizer than the model's"):
        _prepare(sparse, random_init=False)
    (folder / "train.json").unlink()
    write_tokens(folder / "validation", [*range(3, 123), 700] * 10)
    with pytest.raises(
        UserError, match=r"validation.bin contains the token 700, but the model's vocabulary ends at 127"
    ):
        _prepare(sparse, random_init=False)
    assert not (sparse.parent / "run").exists()


def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_written(sparse):
    teacher = save_tiny_tokenizer(make_tiny_llama(sparse.parent / "teacher"), vocab=127)
    distill = Distillation(teacher=str(teacher))
    training = Training(
        tokens=512, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4, distill=distill
    )
    folder = sparse.parent
    with pytest.raises(UserError, match="differ, first at token 127"):
        prepare_job(str(sparse), folder / "run", folder / "data", Parallelism(), training, random_init=False)
    assert not (folder / "run").exists()


def test_a_sparse_model_of_another_tool_is_told_what_to_do_and_that_works(sparse, capsys):
    """Without its masks a model's zeros would fill; magnitude pruning finds exactly them again."""
    dense = HuggingFaceSource(sparse.parent / "dense")
    pruned = MagnitudeSource(dense, Sparsity.parse("2:4"))
    write_huggingface(pruned, sparse.parent / "foreign")
    config = read_json(sparse.parent / "foreign" / "config.json")
    write_json(sparse.parent / "foreign" / "config.json", {**config, CONFIG_KEY: None})
    (sparse.parent / "foreign" / FILE).unlink()
    _prepare(sparse.parent / "foreign", random_init=False)
    said = capsys.readouterr().out
    assert "50% zeros in model.layers.0.self_attn.q_proj.weight and no masks" in said
    assert "--method magnitude --sparsity 2:4 keeps these zeros" in said
    again = MagnitudeSource(HuggingFaceSource(sparse.parent / "foreign"), Sparsity.parse("2:4"))
    for name in masks_of(pruned).names:
        assert torch.equal(masks_of(again).read(name), masks_of(pruned).read(name))
        assert torch.equal(again.read(name), pruned.read(name))


def test_random_weights_are_drawn_as_it_is_asked(sparse):
    common = {"tokens": 512, "sequence_length": 32, "global_batch_size": 4, "learning_rate": 1e-3, "seed": 5}
    training = Training(**common, validation_samples=4, initialisation="maxtext")
    folder, dense = sparse.parent, sparse.parent / "dense"
    job = prepare_job(str(dense), folder / "run", folder / "data", Parallelism(), training, random_init=True)
    initial, config = NemoSource(job.initial), HuggingFaceSource(dense).config
    expected = RandomSource(config, 5, dtype=torch.bfloat16, initialisation="maxtext")
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(initial.read(name), expected.read(name))
    other = training.model_copy(update={"initialisation": "megatron"})
    with pytest.raises(UserError, match="holds a run with other settings or weights"):
        prepare_job(str(dense), folder / "run", folder / "data", Parallelism(), other, random_init=True)


def test_damaged_initial_weights_are_refused_before_a_rank_starts(sparse, tmp_path):
    job = _job(sparse, random_init=False)
    flip_a_bit_of_a_weight(job.initial, "model.embed_tokens.weight")
    with (
        Trainer(tmp_path / "launcher.log") as trainer,
        pytest.raises(UserError, match=r"^model\.embed_tokens\.weight in "),
    ):
        trainer.train(job)
    assert not (tmp_path / "launcher.log").exists()
