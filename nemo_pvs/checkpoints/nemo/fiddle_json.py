"""Reads and writes Fiddle's JSON form of configs, as far as NeMo's checkpoints need it, without Fiddle.

A file lists objects under keys. A config is an object with the class that it configures and its arguments, each of
which is a leaf (a JSON value), a pyref (an importable object, by name) or a ref (another object, by key). Objects and
arguments record their path from the root, by which NeMo finds a part such as ``<root>.model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_VERSION = "0.0.1"  # of the format, in Fiddle 0.3
_MODULE = "fiddle._src.config"
_NOTHING = object()


@dataclass(frozen=True)
class Symbol:
    """An importable object, by name."""

    module: str
    name: str


_MOVED = {"nemo_pvs.training.uneven": "nemo_pvs.megatron.uneven"}
"""Modules by the names that the checkpoints in ``tests/unchanged/golden`` give them, and their current names."""

_LIST = Symbol("builtins", "list")
_TUPLE = Symbol("builtins", "tuple")


@dataclass(frozen=True)
class Config:
    """A class (or function) and its arguments: leaves, lists of leaves, empty dicts, Symbols and other Configs."""

    symbol: Symbol
    arguments: Mapping[str, Any]


def dump(root: Config) -> dict[str, Any]:
    """Return the JSON form of a tree of configs, in which each class may occur only once."""
    objects: dict[str, Any] = {}
    reference = _encode(root, "<root>", objects)
    return {"root": reference, "objects": objects, "refcounts": dict.fromkeys(objects, 1), "version": _VERSION}


def find(document: Any, *paths: str) -> Config | None:
    """Return the config at the first of ``paths`` that exists, or None; arguments that are configs are left out."""
    try:
        objects = document["objects"]
        for path in paths:
            for stored in objects.values():
                if path in stored.get("paths", ()):
                    return _decode(stored, objects)
    except (AttributeError, LookupError, TypeError, ValueError, StopIteration, RecursionError):
        pass  # not a file of this format, so it has no config
    return None


def _encode(value: Any, path: str, objects: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, Symbol):
        return {**_pyref(value), "paths": [path]}
    if value == {}:
        return {**_empty_dict(), "paths": [path]}
    if isinstance(value, list):
        items = [
            [f"Index(index={index})", _encode(item, f"{path}[{index}]", objects)] for index, item in enumerate(value)
        ]
        return {"type": _pyref(_LIST), "items": items, "metadata": None, "paths": [path]}
    if not isinstance(value, Config):
        return {"type": "leaf", "value": value, "paths": [path]}
    items = [
        [f"Attr(name={name!r})", _encode(argument, f"{path}.{name}", objects)]
        for name, argument in value.arguments.items()
    ]
    key = re.sub(r"(?<=[^_A-Z])(?=[A-Z])", "_", value.symbol.name).lower() + "_1"
    objects[key] = {
        "type": _pyref(Symbol(_MODULE, "Config")),
        "items": items,
        "metadata": _metadata(value),
        "paths": [path],
    }
    return {"type": "ref", "key": key}


def _metadata(config: Config) -> dict[str, Any]:
    """Return the metadata that Fiddle stores: the class, the argument names, and empty tags and history."""
    kind = _pyref(Symbol(_MODULE, "BuildableTraverserMetadata"))
    values = {
        "fn_or_cls": _pyref(config.symbol),
        "argument_names": _tuple(*config.arguments),
        "argument_tags": _empty_dict(),
        "argument_history": _empty_dict(),
    }
    items = [[f"Attr(name={name!r})", value] for name, value in values.items()]
    return {"type": kind, "items": items, "metadata": kind}


def _tuple(*values: str) -> dict[str, Any]:
    items = [[f"Index(index={index})", value] for index, value in enumerate(values)]
    return {"type": _pyref(_TUPLE), "items": items, "metadata": None}


def _empty_dict() -> dict[str, Any]:
    return {"type": _pyref(Symbol("builtins", "dict")), "items": [], "metadata": _tuple()}


def _pyref(symbol: Symbol) -> dict[str, Any]:
    return {"type": "pyref", "module": symbol.module, "name": symbol.name}


def _decode(stored: Mapping[str, Any], objects: Mapping[str, Any]) -> Config:
    metadata = stored["metadata"]
    if metadata["type"] == "ref":
        metadata = objects[metadata["key"]]
    symbol = next(value for name, value in metadata["items"] if name == "Attr(name='fn_or_cls')")
    arguments: dict[str, Any] = {}
    for label, value in stored["items"]:
        name = label.removeprefix("Attr(name='").removesuffix("')")
        argument = _decode_argument(value, objects)
        if argument is not _NOTHING:
            arguments[name] = argument
    return Config(_symbol(symbol), arguments)


def _symbol(stored: Mapping[str, Any]) -> Symbol:
    return Symbol(_MOVED.get(stored["module"], stored["module"]), stored["name"])


def _decode_argument(value: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    if value["type"] == "ref":
        value = objects[value["key"]]
    if value["type"] == "leaf":
        return value["value"]
    if value["type"] == "pyref":
        return _symbol(value)
    if value["type"] in (_pyref(_LIST), _pyref(_TUPLE)):
        return [_decode_argument(item, objects) for _, item in value["items"]]
    return _NOTHING
