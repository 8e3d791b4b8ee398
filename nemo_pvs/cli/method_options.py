"""The options of all pruning methods as options of a command, derived from where the methods declare them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional, get_args, get_origin

import typer

from nemo_pvs.pruning.options import TARGET_SIZES
from nemo_pvs.pruning.registry import methods

# nemo_run reads these annotations too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

AMOUNT = "How much to remove"
METHOD = "Options of the method"


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``**options`` an option for each one of any method; sizes are up to the command.

    They come before the command's own options that have a default.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    required = [one for one in own if one.default is inspect.Parameter.empty]
    others = [one for one in own if one.default is not inspect.Parameter.empty]
    derived = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
        for name, annotation in _annotations().items()
    ]
    command.__signature__ = signature.replace(parameters=[*required, *derived, *others])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (*required, *derived, *others)}
    return command


def _annotations() -> dict[str, Any]:
    """Return the annotation of each option: its plain type, and help that says what it is in which method."""
    types: dict[str, Any] = {}
    docs: dict[str, dict[str, list[str]]] = {}
    amounts: set[str] = {"of"}
    for method in methods().values():
        amounts.update(method.options.amounts)
        for name, field in method.options.model_fields.items():
            if name not in TARGET_SIZES:
                types[name] = _plain(field.annotation)
                docs.setdefault(name, {}).setdefault(field.description or "", []).append(method.name)
    annotations = {}
    for name, kind in types.items():
        panel = AMOUNT if name in amounts else METHOD
        annotations[name] = Annotated[Optional[kind], typer.Option(help=_help(docs[name]), rich_help_panel=panel)]
    return annotations


def _plain(annotation: Any) -> Any:
    """Return the type of a value on a command line; a choice is a text, which its method checks."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return str
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return _plain(kinds[0]) if kinds else annotation


def _help(docs: dict[str, list[str]]) -> str:
    """Return what an option is, with the methods that it is different for."""
    if len(docs) == 1:
        return next(iter(docs))
    return "; ".join(f"{', '.join(names)}: {doc}" for doc, names in docs.items())
