"""The methods that train first: each has an answer for the recipe and for the stage of a run."""

from __future__ import annotations

from nemo_pvs.pipeline.stages import learned as stage
from nemo_pvs.planning.learned import first_of_each_training, is_trained_first, learned_targets
from nemo_pvs.pruning.registry import methods
from nemo_pvs.recipe.load import load_recipe


def test_every_method_that_trains_is_known() -> None:
    trains = {name for name, method in methods().items() if method.trains}
    recipe = load_recipe("smollm2_135m/methods")
    assert trains == {target.method for target in recipe.targets.values() if is_trained_first(target)}
    assert trains == stage._METHODS.keys()


def test_targets_that_differ_after_the_training_share_it() -> None:
    recipe = load_recipe("smollm2_135m/methods")
    targets = [name for name, target in recipe.targets.items() if is_trained_first(target)]
    assert len(learned_targets(recipe)) == len(targets)
    again = {
        f"{name}-again": target.model_copy(update={"learning_rate": 1e-5}) for name, target in recipe.targets.items()
    }
    assert [
        name for name, _ in first_of_each_training(recipe.model_copy(update={"targets": recipe.targets | again}))
    ] == [name for name, _ in first_of_each_training(recipe)]


def test_the_micro_batch_of_the_masks_goes_before_that_of_the_arms() -> None:
    """The parent is trained whole, so it may need smaller ones; the arms' layout is the default for all else."""
    recipe = load_recipe("smollm2_135m/sheared")
    name, target = next((name, one) for name, one in recipe.targets.items() if is_trained_first(one))
    layout = target.layout.model_copy(update={"micro_batch_size": 4})
    for given, expected in ((1, 1), (None, 4)):
        assert target.learn is not None
        learn = target.learn.model_copy(update={"micro_batch_size": given, "layout": None})
        changed = target.model_copy(update={"learn": learn, "layout": layout})
        (learned,) = learned_targets(recipe.model_copy(update={"targets": {name: changed}}))
        assert (learned.layout.micro_batch_size or learned.training.micro_batch_size) == expected
        assert learned.layout.pipeline_parallel == layout.pipeline_parallel
