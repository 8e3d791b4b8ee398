import pytest

from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.planning.memory import _of_teacher, parameters_on, training_memory
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training

SHAPE = Shape(layers=4, hidden=64, ffn=96, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=False)
TRAINING = Training(
    tokens=1e6, sequence_length=32, global_batch_size=8, learning_rate=1e-3, validation_samples=8, precision="bf16"
)


def test_a_small_model_by_hand():
    memory = training_memory(SHAPE, Parallelism(), TRAINING)
    parameters = SHAPE.parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    layer = 2 * (
        4 * 64 + 2 * 10 * 16 + 3 * 96
    )  # bytes a token: four wide inputs, q, k, v and output, three of the FFN
    head = 2 * 2 * 64 + 2 * 128  # the loss's gradient is written where the logits were
    assert memory.activations == 32 * (4 * layer + head)
    assert memory.activations_recomputed == 32 * (4 * 2 * 64 + layer + head)
    assert memory.total - memory.total_recomputed == memory.activations - memory.activations_recomputed


def test_recomputation_keeps_less_by_hand():
    kept = {}
    for recompute in ("none", "selective", "full"):
        kept[recompute] = training_memory(SHAPE, Parallelism(recompute=recompute), TRAINING).activations
    mlp = 2 * 3 * 96  # bytes a token in each of four layers, of which one is kept at a time
    assert kept["none"] - kept["selective"] == 32 * 3 * mlp
    assert kept["full"] == training_memory(SHAPE, Parallelism(), TRAINING).activations_recomputed


def test_the_layouts_own_micro_batch_counts():
    two = TRAINING.model_copy(update={"micro_batch_size": 2})
    assert training_memory(SHAPE, Parallelism(micro_batch_size=2), TRAINING) == training_memory(
        SHAPE, Parallelism(), two
    )


def test_fp32_and_shared_optimizer():
    fp32 = TRAINING.model_copy(update={"precision": "fp32"})
    one = training_memory(SHAPE, Parallelism(), fp32)
    assert (one.weights, one.optimizer) == (4 * SHAPE.parameters, 8 * SHAPE.parameters)
    shared = training_memory(SHAPE, Parallelism(data_parallel=4), fp32)
    assert shared.optimizer == one.optimizer / 4
    assert training_memory(SHAPE, Parallelism(data_parallel=4, distributed_optimizer=False), fp32) == one


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_the_ranks_of_a_model_hold_all_of_it(tied, pipeline):
    shape = SHAPE.replace(tied=tied)
    held = sum(parameters_on(shape, Parallelism(pipeline_parallel=pipeline), stage) for stage in range(pipeline))
    copy = shape.vocab * shape.hidden if tied and pipeline > 1 else 0  # the last stage needs the embedding too
    assert held == shape.parameters + copy
    halves = sum(
        parameters_on(shape, Parallelism(pipeline_parallel=pipeline, tensor_parallel=2), stage)
        for stage in range(pipeline)
    )
    vectors = shape.vector_parameters + shape.hidden
    assert 2 * halves == held + vectors


def test_unequal_stages_hold_all_of_it_and_their_own_layers():
    layout = Parallelism(pipeline_parallel=3, first_stage_layers=1, last_stage_layers=1)
    held = [parameters_on(SHAPE, layout, stage) for stage in range(3)]
    assert sum(held) == SHAPE.parameters
    one = SHAPE.replace(layers=1)
    assert held[1] == 2 * (one.matrix_parameters + one.vector_parameters)


def test_uneven_layers_and_the_fullest_stage():
    uneven = SHAPE.with_layers([LayerSizes(96, 8, 2)] * 3 + [LayerSizes(16, 4, 1)])
    layout = Parallelism(pipeline_parallel=2)
    assert parameters_on(uneven, layout, 0) == parameters_on(SHAPE, layout, 0)
    assert parameters_on(uneven, layout, 1) < parameters_on(SHAPE, layout, 1)
    first_waits_for_two = training_memory(SHAPE.replace(vocab=2), layout, TRAINING)
    layer = 2 * (4 * 64 + 2 * 10 * 16 + 3 * 96)
    assert first_waits_for_two.activations == 32 * 2 * 2 * layer


def test_sequence_parallel_shards_what_tensor_parallel_leaves():
    plain, sharded = (
        training_memory(SHAPE, Parallelism(tensor_parallel=2, sequence_parallel=sequence), TRAINING)
        for sequence in (False, True)
    )
    assert plain.activations - sharded.activations == 32 * (4 * 4 + 2) * 2 * 64 / 2


@pytest.mark.parametrize(("stages", "pieces"), [(2, 2), (2, 4), (4, 2)])
def test_turns_on_pieces_keep_more_activations(stages, pieces):
    """In the first stage 1 + (p - 1) / (p v) times as many (Korthikanti et al., 2205.05198, section 4.2.2)."""
    shape = SHAPE.replace(layers=16, vocab=2)
    training = TRAINING.model_copy(update={"global_batch_size": 64})
    plain = training_memory(shape, Parallelism(pipeline_parallel=stages), training)
    turns = training_memory(shape, Parallelism(pipeline_parallel=stages, virtual_pipeline=pieces), training)
    assert turns.activations == pytest.approx(plain.activations * (1 + (stages - 1) / (stages * pieces)))
    assert turns.weights == plain.weights


def test_pieces_of_a_stage_are_dealt_out_in_turns():
    sizes = [LayerSizes(16 * (number + 1), 8, 2) for number in range(4)]
    uneven = SHAPE.with_layers(sizes)
    layout = Parallelism(pipeline_parallel=2, virtual_pipeline=2)
    without = uneven.with_layers([sizes[0], sizes[2]])
    assert parameters_on(uneven, layout, 0) == without.matrix_parameters + without.vector_parameters + 128 * 64


def test_a_teacher_is_divided_evenly_whatever_the_pieces_of_its_student():
    """Its 16 layers are four on each of 4 stages; the student's three pieces of one layer do not divide these."""
    teacher, plain = SHAPE.replace(layers=16), Parallelism(pipeline_parallel=4)
    pieces = plain.model_copy(update={"virtual_pipeline": 3})
    for stage in range(4):
        assert _of_teacher(teacher, pieces, stage, 2, 32, 8) == _of_teacher(teacher, plain, stage, 2, 32, 8)
