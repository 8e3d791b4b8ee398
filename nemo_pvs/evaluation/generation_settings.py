"""lm-eval's ``generation_kwargs`` of a task or a request: how to continue a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from nemo_pvs.errors import UserError

_NEW_TOKENS = 256  # lm-eval's default for models of transformers
# What greedy decoding needs to know, or what has no effect on it.
_KNOWN = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}


class GenerationSettings(NamedTuple):
    """How to continue a prompt, greedily."""

    until: tuple[str, ...]
    """Strings that end the continuation and do not belong to it."""
    max_new_tokens: int

    @classmethod
    def parse(cls, settings: Mapping[str, Any] | None, owner: str = "A request") -> GenerationSettings:
        """Read lm-eval's settings.

        Args:
            settings: The settings; lm-eval's defaults where they say nothing.
            owner: What they belong to, for the error message.

        Raises:
            UserError: they ask for anything but greedy decoding.
        """
        options: dict[str, Any] = {"temperature": 0.0, **normalize_gen_kwargs(dict(settings or {}), _NEW_TOKENS)}
        if options.get("num_beams") == 1:
            del options["num_beams"]
        wanted = [f"{name}: {options[name]}" for name in ("do_sample", "temperature") if options["do_sample"]]
        wanted += [f"{name}: {options[name]}" for name in sorted(options.keys() - _KNOWN)]
        if wanted:
            raise UserError(
                f"{owner} generates text with {', '.join(wanted)}, but pvs evaluate supports only greedy decoding "
                "(do_sample: false); leave it out, or convert the model to hf and run lm-eval on it."
            )
        return cls(tuple(str(text) for text in options["until"] or () if text), options["max_gen_toks"])
