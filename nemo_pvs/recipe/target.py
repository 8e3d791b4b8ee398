"""The block ``targets``: what the parent is pruned to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, create_model

from nemo_pvs.pruning.options import SIZES, TARGET_SIZES, Options
from nemo_pvs.pruning.registry import method_named, methods
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Initialisation, Parallelism, Positive, RecipeBlock
from nemo_pvs.recipe.rates import LearningRate, Sweep, peak_of
from nemo_pvs.recipe.sheared import MaskLearning

DENSE = "dense"
"""The method of a target with the parent's own architecture: to train the parent from scratch, or further."""


def _keys_of_methods() -> dict[str, Any]:
    """Return the fields for the options of all methods: the type that the method declares, or None if not given."""
    types: dict[str, Any] = {}
    excluded: dict[str, Any] = {}
    for method in methods().values():
        for name, field in method.options.model_fields.items():
            excluded[name] = field.exclude_if
            declared = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            types[name] = _either(types[name], declared) if name in types else declared
    return {
        name: (declared | None, Field(default=None, exclude_if=excluded[name])) for name, declared in types.items()
    }


def _either(left: Any, right: Any) -> Any:
    """Return the type of an option that two methods share; the choices of literals are combined."""
    if get_origin(left) is Literal and get_origin(right) is Literal:
        return Literal[tuple(dict.fromkeys((*get_args(left), *get_args(right))))]
    return left if left == right else left | right


if TYPE_CHECKING:

    class _MethodKeys(RecipeBlock):
        method: str

else:
    _MethodKeys = create_model(
        "_MethodKeys", __base__=RecipeBlock, method=(Literal[(*methods(), DENSE)], ...), **_keys_of_methods()
    )


class Target(_MethodKeys):
    """One pruned architecture: the method, its options (declared with the method), and how its arms are trained."""

    task_data: str | None = None
    """Folder of downloaded data sets, each under ``<owner>/<name>``; ``TASK_DATA`` by default."""
    stages: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Number of rounds in which the target is reached, each followed by a share of the training."""
    slice_optimizer_state: bool = Field(default=False, exclude_if=lambda given: not given)
    """With ``stages``: keep the AdamW state of the weights that each round keeps, instead of resetting it."""
    learning_rate: LearningRate | None = None
    """Used instead of ``train.learning_rate``."""
    arms: list[Initialisation] | None = Field(default=None, min_length=1, exclude_if=lambda given: given is None)
    """Initial weights from which the target is trained, instead of the recipe's ``arms``."""
    keep_parent_embeddings: bool = False
    """Keep the pruned model's embedding and vectors in the random arm, as the published sparse baseline does."""
    distill: bool = True
    """Whether ``train.distill`` applies to the target's arms; false trains them on the text alone."""
    learn: MaskLearning | None = None
    """Mask learning of ``sheared-llama``."""
    pruning_aware: PruningAware | None = None
    """Pruning-aware training of ``efficient-llm``."""
    layout: Parallelism = Parallelism()

    @property
    def given(self) -> dict[str, Any]:
        """The method's options that were given, by name."""
        values = ((name, getattr(self, name)) for name in _MethodKeys.model_fields if name != "method")
        return {name: value for name, value in values if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The method's options as in the records of a run, where all sizes together are the ``target``."""
        given = self.given
        sizes = ",".join(f"{name}={given.pop(name)}" for name in TARGET_SIZES if name in given)
        return {**({"target": sizes} if sizes else {}), **given}

    @property
    def asked(self) -> Options:
        """The method's options, validated by its own class; empty for a dense target."""
        return Options() if self.method == DENSE else method_named(self.method).options(**self.given)

    @property
    def sizes(self) -> dict[str, int]:
        """The target sizes that were given, by axis."""
        return {name: self.given[name] for name in SIZES if name in self.given}

    def peak(self, initialisation: Initialisation, default: LearningRate) -> float | Sweep:
        """Return the peak learning rate of an arm, or the rates to choose from; ``default`` if the target has none."""
        return peak_of(default if self.learning_rate is None else self.learning_rate, initialisation)
