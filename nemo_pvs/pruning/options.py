"""The options of a pruning method, declared once: commands, recipes, help and documents are derived from here.

A method has a subclass of ``Options`` with a field for each of its options: type, default, bounds, and one line of
help. Methods share an option through a common base class.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from nemo_pvs.errors import UserError

SIZES = ("layers", "hidden", "ffn", "kv_groups", "heads")
"""The sizes of a model's layers that pruning can reduce; query heads follow the KV groups unless their number is
given."""
VOCAB = "vocab"
"""The size of the vocabulary, which can be reduced in addition to the layers."""
TARGET_SIZES = (*SIZES, VOCAB)
"""All sizes that a target can give."""

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


OptionsT = TypeVar("OptionsT", bound="Options")


class Options(BaseModel):
    """Options of a method; an option that is not given has the method's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    amounts: ClassVar[tuple[str, ...]] = ()
    """The options that say how much to remove, of which exactly one must be given; ``sizes`` stands for all sizes."""

    @classmethod
    def parse(cls: type[OptionsT], method: str, values: dict[str, Any], spelling: str = "{}") -> OptionsT:
        """Validate the values that a user gave.

        Args:
            method: The method's name, for messages.
            values: Values by name; None means that an option was not given.
            spelling: How messages spell an option; ``--{}`` for a command.

        Raises:
            UserError: the method has no such option, or the value is invalid.
        """
        given = {name: value for name, value in values.items() if value is not None}
        foreign = [name for name in given if name not in cls.model_fields]
        sizes = [name for name in cls.model_fields if name in TARGET_SIZES]
        if sizes and foreign and foreign[0] in TARGET_SIZES:
            raise UserError(
                f"{method} does not change {foreign[0]}; the sizes that it changes are {', '.join(sizes)}."
            )
        if foreign:
            names = " or ".join(dict.fromkeys(cls.spelt(name, spelling) for name in foreign))
            known = ", ".join(cls.names(spelling)) or "none"
            raise UserError(f"{method} has no {names}; its options are {known}.")
        try:
            return cls(**given)
        except ValidationError as error:
            raise UserError(_sentence(error.errors()[0], spelling)) from None

    @classmethod
    def names(cls, spelling: str = "{}") -> list[str]:
        """Return the names of the options as messages spell them; a command has all sizes in one option, --target."""
        return list(dict.fromkeys(cls.spelt(name, spelling) for name in cls.model_fields))

    @staticmethod
    def spelt(name: str, spelling: str) -> str:
        """Return an option as messages spell it."""
        if spelling.startswith("--"):
            return "--target" if name in TARGET_SIZES else spelling.format(name.replace("_", "-"))
        return spelling.format(name)

    def given(self, *names: str) -> dict[str, Any]:
        """Return the options that were given, of ``names`` if there are any, as keyword arguments."""
        return {
            name: getattr(self, name) for name in names or type(self).model_fields if name in self.model_fields_set
        }


def option(doc: str, default: Any = None, **settings: Any) -> Any:
    """Declare an option: one line that says what it is, its default, and pydantic's settings (``ge``, ``lt``, ...)."""
    return Field(default=default, description=doc, **settings)


def not_given(value: Any) -> bool:
    """Return whether an option was not given.

    As ``exclude_if`` of an option it leaves recipes without the option as they were before the option existed, so that
    finished runs are recognised.
    """
    return value is None


def _sentence(problem: ErrorDetails, spelling: str) -> str:
    name = Options.spelt(str(problem["loc"][0]), spelling)
    if problem["type"] == "literal_error":
        return f"{name} is {problem['input']!r}; choose {problem['ctx']['expected']}."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name} is {problem['input']!r}; it {message[0].lower()}{message[1:]}."


class SizesOrPreset(Options):
    """The size to reach: numbers, or a published name."""

    amounts: ClassVar[tuple[str, ...]] = ("sizes", "preset")

    layers: Positive | None = option("layers to keep")
    hidden: Positive | None = option("hidden size to reach")
    ffn: Positive | None = option("FFN channels to keep in each layer")
    kv_groups: Positive | None = option("KV groups to keep in each layer")
    heads: Positive | None = option(
        "query heads to keep in each layer, the same number in every KV group", exclude_if=not_given
    )
    preset: str | None = option("a published target, e.g. llama31_8b/4b-width")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        return self.given(*SIZES)


class VocabularySize(Options):
    """The size of the vocabulary, which any structured method may reduce together with the layers."""

    vocab: Positive | None = option("tokens to keep", exclude_if=not_given)


class SizesOrRatio(VocabularySize, SizesOrPreset):
    """The size to reach: numbers, a share of the parameters, or a published name."""

    amounts: ClassVar[tuple[str, ...]] = ("sizes", "ratio", "preset")

    ratio: Share | None = option("share to remove, e.g. 0.5")
    of: Literal["body", "total"] = option("what the ratio is a share of: body or total", "body")


class QueryHeads(Options):
    """Query heads can be removed inside their KV groups."""

    merge_heads: bool = option(
        "add the residual of removed query heads to kept ones, as in Minitron's paper", False, exclude_if=not_given
    )


class ProtectedLayers(Options):
    """Layers that are never removed or pruned."""

    protect_first: NotNegative = option("layers at the input that are left as they are", 0)
    protect_last: NotNegative = option("layers at the output that are left as they are", 0)


class Multiples(Options):
    """What remains of each layer is a multiple of these."""

    ffn_multiple: Positive = option("FFN channels remain in multiples of this", 1)
    kv_groups_multiple: Positive = option("KV groups remain in multiples of this", 1)


class Units(VocabularySize, Multiples):
    """KV groups and FFN channels are counted layer by layer, or over all layers."""

    amounts: ClassVar[tuple[str, ...]] = ("ratio",)

    ratio: Share | None = option("share to remove, e.g. 0.5")
    structure: Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"] = option(
        "whether scores are compared within a layer (UL) or across all (AL), and modules alike (UM) or mixed", "UL-UM"
    )
    remove_groups: NotNegative | None = option("KV groups to remove from every layer")
    attention_unit: Literal["groups", "heads"] = option(
        "what is removed from attention: groups (KV groups) or heads (query heads, the same number from every KV "
        "group of a layer)",
        "groups",
        exclude_if=not_given,
    )


def _pattern(value: Any) -> Any:
    """Undo YAML's reading of an unquoted 2:4 as the sexagesimal number 124; no sparsity is 60 or more."""
    if isinstance(value, int) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return str(value) if isinstance(value, float) else value


class Sparse(Options):
    """Single weights are set to zero."""

    amounts: ClassVar[tuple[str, ...]] = ("sparsity",)

    sparsity: Annotated[str | None, BeforeValidator(_pattern)] = option("0.5, or 2:4 for two zeros in four")
