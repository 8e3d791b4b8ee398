"""The block ``targets``: what the parent is pruned to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, create_model

from nemo_pvs.pruning.options import SIZES, Options
from nemo_pvs.pruning.registry import method_named, methods
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Block, Initialisation, Parallelism, Positive, Rate
from nemo_pvs.recipe.sheared import MaskLearning

DENSE = "dense"
"""The method of a target that is the parent's own architecture: to train the parent itself, or to train it further."""


class Rates(Block):
    """Peak learning rates by initial weights."""

    pruned: Rate
    random: Rate


def _keys_of_methods() -> dict[str, Any]:
    """Return a key for each option of a method: its type as declared with the method, or None where it isn't given."""
    types: dict[str, Any] = {}
    for method in methods().values():
        for name, field in method.options.model_fields.items():
            declared = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            types[name] = _either(types[name], declared) if name in types else declared
    return {name: (declared | None, None) for name, declared in types.items()}


def _either(one: Any, other: Any) -> Any:
    """Return the type of an option that two methods have; choices are put together."""
    if get_origin(one) is Literal and get_origin(other) is Literal:
        return Literal[tuple(dict.fromkeys((*get_args(one), *get_args(other))))]
    return one if one == other else one | other


if TYPE_CHECKING:

    class _MethodKeys(Block):
        method: str

else:
    _MethodKeys = create_model(
        "_MethodKeys", __base__=Block, method=(Literal[(*methods(), DENSE)], ...), **_keys_of_methods()
    )


class Target(_MethodKeys):
    """One pruned architecture: the method, its options (declared with the method), and how its arms are trained."""

    task_data: str | None = None
    """Folder of downloaded data sets, ``<owner>/<name>`` each; ``TASK_DATA`` where it is left out."""
    stages: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Reach the target in so many steps, with a share of the training behind each (``staged``)."""
    slice_optimizer_state: bool = Field(default=False, exclude_if=lambda given: not given)
    """Of ``stages``: go on with what each stage's pruning leaves of AdamW's state, instead of beginning it anew."""
    learning_rate: Rate | Rates | None = None
    """Instead of ``train.learning_rate``: one, or one for each kind of initial weights."""
    arms: list[Initialisation] | None = Field(default=None, min_length=1, exclude_if=lambda given: given is None)
    """Initial weights to train it from, instead of the recipe's ``arms``."""
    keep_parent_embeddings: bool = False
    """The random arm keeps the pruned model's embedding and vectors, as the published sparse baseline does."""
    distill: bool = True
    """Whether ``train.distill`` is for its arms, too; false trains them on the text alone."""
    learn: MaskLearning | None = None
    """How ``sheared-llama`` learns its masks."""
    pruning_aware: PruningAware | None = None
    """How much ``efficient-llm`` removes, and when, while the parent is trained."""
    layout: Parallelism = Parallelism()

    @property
    def given(self) -> dict[str, Any]:
        """The options of methods that were given, by name."""
        values = ((name, getattr(self, name)) for name in _MethodKeys.model_fields if name != "method")
        return {name: value for name, value in values if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """What is asked of the method, as the records of a run name it: all sizes together are the ``target``."""
        given = self.given
        sizes = ",".join(f"{name}={given.pop(name)}" for name in SIZES if name in given)
        return {**({"target": sizes} if sizes else {}), **given}

    @property
    def asked(self) -> Options:
        """What is asked of the method, in the method's own class; of a dense target nothing."""
        return Options() if self.method == DENSE else method_named(self.method).options(**self.given)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are asked for."""
        return {name: self.given[name] for name in SIZES if name in self.given}

    def peak(self, initialisation: Initialisation, default: float) -> float:
        """Return the peak learning rate of an arm."""
        rate = self.learning_rate
        return default if rate is None else getattr(rate, initialisation) if isinstance(rate, Rates) else rate
