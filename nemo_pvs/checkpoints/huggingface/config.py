"""Hugging Face configs in a normal form, whichever version of Transformers or other program wrote them.

Every reader of a config passes it through ``normal_config``, so the rest of the package handles a single spelling, and
a setting that changes what the same weights compute is refused instead of ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.huggingface.config_types import check_types
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout, layouts
from nemo_pvs.system.files import read_json
from nemo_pvs.system.progress import say_once

# Settings of other families that change what a model computes, and the values with which they change nothing. No
# family in conversions/ has them: Transformers' classes ignore them there, but other programs do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "interleaved_sliding_window": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "no_rope_layers": ([],),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": ({}, []),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rotary_pct": (1.0,),
    "scale_depth": (),
    "scale_emb": (1.0,),
    "use_bidirectional_attention": (False,),
}

_QUANTIZATION = ("quantization_config", "compression_config")


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` and return it in normal form.

    Raises:
        UserError: it is missing or broken, or ``normal_config`` refuses it.
    """
    return normal_config(read_json(path), path)


def normal_config(config: Any, where: str | Path) -> dict[str, Any]:
    """Return a copy of a Hugging Face config in normal form.

    ``architectures`` is a list with one class that a table in ``conversions/`` names, and ``model_type`` agrees with
    it. ``max_position_embeddings`` is present, and so is ``rope_theta``, a float. ``rope_scaling`` is a dictionary
    with ``rope_type``, or None or absent if nothing is scaled. There is no ``rope_parameters``. All other keys stay as
    they are.

    Args:
        config: The parsed file.
        where: Name of the file in messages.

    Raises:
        UserError: it is not a config of a known family, contradicts itself, or has a setting that the family does not
            support.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where} is not a model's configuration; download it again.")
    check_types(config, where)
    config = {**config, **_class_names(config, where)}
    layout = Layout.for_config(config)
    theta, scaling = _rope(config, float(layout.defaults["rope_theta"]), where)
    config["rope_theta"] = theta
    if config.get("max_position_embeddings") is None:
        config["max_position_embeddings"] = layout.defaults["max_position_embeddings"]
    if {"rope_scaling", "rope_parameters"} & config.keys():
        config["rope_scaling"] = scaling
    config.pop("rope_parameters", None)
    for key, neutral in _NEUTRAL.items():
        if config.get(key) is not None and config[key] not in neutral:
            raise UserError(
                f"{where} sets {key} to {config[key]}, which {config['architectures'][0]} does not compute; use the "
                "config.json that belongs to these weights."
            )
    _check_windows(config, layout, where)
    return config


def without_quantization(config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Return a config without its quantisation settings, for weights that are plain floats; report that once."""
    stated = [key for key in _QUANTIZATION if config.get(key)]
    if stated:
        say_once(
            f"{where} has {' and '.join(stated)}, but the weights are plain floating-point numbers; it is ignored."
        )
    return {key: value for key, value in config.items() if key not in _QUANTIZATION}


def quantization(config: Mapping[str, Any]) -> str | None:
    """Return the name of the quantisation method that a config states; None if it states none."""
    stated = next((config[key] for key in _QUANTIZATION if config.get(key)), None)
    if stated is None:
        return None
    return str(stated.get("quant_method") or "an unnamed method") if isinstance(stated, dict) else str(stated)


def _class_names(config: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Return matching ``architectures`` and ``model_type``; an empty dictionary if no table has them."""
    stated, model_type = config.get("architectures"), config.get("model_type")
    known = {}
    for layout in layouts():
        for architecture, layout_type in filter(None, (layout.even_class, layout.uneven_class)):
            known[architecture] = layout_type
    names = [name for name in stated or known if name in known]
    fitting = [name for name in names if model_type in (None, known[name])]
    if stated and names and not fitting:
        raise UserError(
            f"{where} contradicts itself: architectures is {names[0]}, but model_type is {model_type}; correct the "
            "one that is wrong for these weights."
        )
    if not fitting or (not stated and model_type is None):
        return {}
    return {"architectures": fitting[:1], "model_type": known[fitting[0]]}


def _rope(config: Mapping[str, Any], default: float, where: str | Path) -> tuple[float, dict[str, Any] | None]:
    """Return the base and the scaling of the rotary embedding.

    Transformers 5 stores both in ``rope_parameters``; version 4, when it saves such a model again, writes its own
    defaults next to them. So ``rope_parameters`` takes precedence over a default base and over no scaling.
    """
    base = _base(config.get("rope_theta"), where)
    inner, scaling = _rope_settings(config, "rope_scaling", where)
    moved, parameters = _rope_settings(config, "rope_parameters", where)
    stated = [value for value in (moved, inner, base) if value is not None]
    others = {value for value in stated[1:] if value != default}
    if others - set(stated[:1]):
        raise UserError(
            f"{where} has several bases of the rotary embedding ({', '.join(f'{value:g}' for value in stated)}) in "
            "rope_theta, rope_scaling and rope_parameters; delete those that are wrong for these weights."
        )
    if config.get("rope_parameters") and scaling not in (None, parameters):
        raise UserError(
            f"{where} has a rope_scaling other than that in rope_parameters; delete the one that is wrong for these "
            "weights."
        )
    return (stated[0] if stated else default), parameters or scaling


def _rope_settings(
    config: Mapping[str, Any], key: str, where: str | Path
) -> tuple[float | None, dict[str, Any] | None]:
    """Return the base in one of the two dictionaries, and its scaling in the spelling of Transformers 4."""
    stated = config.get(key) or {}
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise UserError(
            f"{where} has {stated!r} for {key}; only one dictionary of settings for all layers is supported."
        )
    settings = {name: value for name, value in stated.items() if value is not None}
    base = _base(settings.pop("rope_theta", None), where)
    fraction = settings.pop("partial_rotary_factor", 1.0)
    kinds = [settings.pop(name) for name in ("rope_type", "type") if name in settings] or ["default"]
    length = settings.get("original_max_position_embeddings")
    elsewhere = config.get("original_max_position_embeddings")
    if (
        fraction != 1.0
        or not isinstance(kinds[0], str)
        or kinds[-1] != kinds[0]
        or (kinds[0] != "default" and elsewhere not in (None, length))
    ):
        raise UserError(
            f"{where} has {stated!r} for {key}, which contradicts itself or which no supported family computes; use "
            "the config.json that belongs to these weights."
        )
    if kinds[0] == "default":
        return base, None
    # 8 and 8.0 are the same factor; Transformers expects floats, except for lengths.
    numbers = {
        name: _whole_as_float(value) if name != "original_max_position_embeddings" else value
        for name, value in settings.items()
    }
    return base, dict(sorted({"rope_type": kinds[0], **numbers}.items()))


def _base(value: Any, where: str | Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise UserError(f"{where} has {value!r} for rope_theta, which must be a positive number; restore the file.")
    return float(value)


def _whole_as_float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) < 1e15 else value


def _check_windows(config: Mapping[str, Any], layout: Layout, where: str | Path) -> None:
    """Refuse attention windows that the family's class ignores but other programs may apply.

    Llama has no window, Mistral one for all layers, and Qwen none unless ``use_sliding_window`` is set.
    """
    settings = {**layout.defaults, **config}
    layers, window, kinds = (settings.get(key) for key in ("num_hidden_layers", "sliding_window", "layer_types"))
    architecture = config["architectures"][0]
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == layers):
        raise UserError(f"{where} does not have one entry in layer_types per layer ({layers}); restore the file.")
    if "use_sliding_window" in layout.fixed:
        if settings.get("use_sliding_window"):
            first = settings.get("max_window_layers", 0)
            if not isinstance(first, int):
                raise UserError(f"{where} has {first!r} for max_window_layers; it must be a whole number.")
            return
        window = None
    elif "sliding_window" not in layout.defaults and window is not None:
        context = settings.get("max_position_embeddings")
        if not (isinstance(window, int) and isinstance(context, int) and window >= context):
            raise UserError(
                f"{where} sets sliding_window to {window}, which {architecture} does not compute; set it to null if "
                "the model was trained without it."
            )
        window = None
    wanted = "full_attention" if window is None else "sliding_attention"
    others = sorted({str(kind) for kind in kinds or ()} - {wanted})
    if others:
        raise UserError(
            f"{where} has {', '.join(others)} among its layer_types, but {architecture} computes {wanted} in every "
            "layer; use the config.json that belongs to these weights."
        )
