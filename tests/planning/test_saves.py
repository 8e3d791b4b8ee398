import pytest

from nemo_pvs.cli.dry_run_table import show_series
from nemo_pvs.cluster.profile import SlurmProfile
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.memory import parameters_on
from nemo_pvs.planning.saves import Save, last_save, save_during_run
from nemo_pvs.pruning.presets import target_presets
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.recipe.training import Training

TRAINING = Training(
    tokens=1e6, sequence_length=32, global_batch_size=8, learning_rate=1e-3, validation_samples=8, precision="bf16"
)
SHAPE = Shape(layers=4, hidden=64, ffn=96, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=False)
GB = 1e9


def test_the_parts_of_a_node_are_its_share_of_the_checkpoint():
    """A checkpoint has 14 bytes per parameter, which 64 ranks hold in equal parts."""
    whole = 14 * SHAPE.parameters
    save = save_during_run(SHAPE, Parallelism(data_parallel=32, context_parallel=2), TRAINING)
    assert save == Save(host=pytest.approx(whole / 8), seconds=pytest.approx(whole / 64 / 10e9))
    alone = save_during_run(SHAPE, Parallelism(), TRAINING)
    assert alone.host == whole
    assert last_save(SHAPE, Parallelism(), TRAINING) == Save(whole, whole / 10e9 + whole / 1e9)


def test_one_rank_gathers_what_every_rank_used_to():
    """4.5 B at TP 1: 54 GB, not 54 GB on each of the eight GPUs of a node."""
    shape = target_presets()["llama31_8b/4b-width"].target
    state = 12 * shape.parameters
    assert state == pytest.approx(54 * GB, rel=0.01)
    last = last_save(shape, Parallelism(data_parallel=128), TRAINING)
    assert state < last.host < 1.1 * state
    assert last.seconds == pytest.approx(2 * state / 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("layout", "gathering"),
    [
        ({"tensor_parallel": 2, "data_parallel": 4}, 2),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2}, 4),  # both stages on one node
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 4}, 2),  # a node each
    ],
)
def test_ranks_that_gather_on_the_same_node_add_up(layout, gathering):
    layout = Parallelism(**layout)
    extra = last_save(SHAPE, layout, TRAINING).host - save_during_run(SHAPE, layout, TRAINING).host
    of_rank = 12 * max(parameters_on(SHAPE, layout, stage) for stage in range(layout.pipeline_parallel))
    assert extra == pytest.approx(gathering * of_rank)


def test_a_plain_optimizer_gathers_nothing():
    layout = Parallelism(data_parallel=8, distributed_optimizer=False)
    assert last_save(SHAPE, layout, TRAINING).host == save_during_run(SHAPE, layout, TRAINING).host


def test_nodes_of_another_size_hold_more_or_less_of_it():
    layout = Parallelism(tensor_parallel=2, data_parallel=8)
    large, small = (save_during_run(SHAPE, layout, TRAINING, gpus).host for gpus in (16, 4))
    assert large == 4 * small
    both, one = (last_save(SHAPE, layout, TRAINING, gpus).host for gpus in (8, 1))
    of_rank = 12 * parameters_on(SHAPE, layout, 0)
    assert both - save_during_run(SHAPE, layout, TRAINING, 8).host == pytest.approx(2 * of_rank)
    assert one - save_during_run(SHAPE, layout, TRAINING, 1).host == pytest.approx(of_rank)


@pytest.mark.parametrize(("seconds", "warned"), [(300, False), (150, True)])
def test_too_little_time_for_the_last_save_is_said(capsys, tmp_path, seconds, warned):
    """P200 takes 192 s by the assumed rates."""
    profile = SlurmProfile(kind="slurm", account="physics", seconds_to_save=seconds)
    show_series(load_recipe("llama31_8b/p200"), tmp_path, "slurm", cluster=profile)
    assert ("warning: p200 is signalled 150 s (seconds_to_save) before" in capsys.readouterr().out) is warned
