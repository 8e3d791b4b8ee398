"""Prune a Llama-family model, keep training it on Megatron, and compare it with training from scratch.

The Python API: ``import nemo_pvs as pvs``, then ``pvs.prune(...)``. Each name is imported when it is first used.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_pvs.api.calibrate import calibrate as calibrate
    from nemo_pvs.api.convert import convert as convert
    from nemo_pvs.api.evaluate import evaluate as evaluate
    from nemo_pvs.api.open_checkpoint import open_checkpoint as open_checkpoint
    from nemo_pvs.api.prune import prune as prune
    from nemo_pvs.api.report import report as report
    from nemo_pvs.api.run import run as run
    from nemo_pvs.api.search import search as search
    from nemo_pvs.api.teach import teach as teach
    from nemo_pvs.api.tokenize import tokenize as tokenize
    from nemo_pvs.api.train import train as train
    from nemo_pvs.api.train_tokenizer import train_tokenizer as train_tokenizer
    from nemo_pvs.calibration.scores import Scores as Scores
    from nemo_pvs.errors import UserError as UserError
    from nemo_pvs.ledger.ledger import Ledger as Ledger
    from nemo_pvs.model.layout import Layout as Layout
    from nemo_pvs.model.shape import Shape as Shape
    from nemo_pvs.pruning.plan import Plan as Plan
    from nemo_pvs.recipe.load import load_recipe as load_recipe

__version__ = "0.1.0"

# PyTorch warns on import about a package that NeMo pins and nothing here calls.
warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)

_MODULES = {
    "Layout": "model.layout",
    "Ledger": "ledger.ledger",
    "Plan": "pruning.plan",
    "Scores": "calibration.scores",
    "Shape": "model.shape",
    "UserError": "errors",
    "calibrate": "api.calibrate",
    "convert": "api.convert",
    "evaluate": "api.evaluate",
    "load_recipe": "recipe.load",
    "open_checkpoint": "api.open_checkpoint",
    "prune": "api.prune",
    "report": "api.report",
    "run": "api.run",
    "search": "api.search",
    "teach": "api.teach",
    "tokenize": "api.tokenize",
    "train": "api.train",
    "train_tokenizer": "api.train_tokenizer",
}
"""The module that defines each public name."""

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def _find_packages_of_a_checkout() -> None:
    """Find recipes, conversions and launch next to this package if it is imported from a checkout.

    An editable install maps them; but Python also takes the checkout if it is the working directory and a wheel is
    installed, and jobs start with ``python -m`` where the command was given.
    """
    for name in ("recipes", "conversions", "launch"):
        file = Path(__file__).parents[1] / name / "__init__.py"
        spec = spec_from_file_location(f"{__name__}.{name}", file)
        assert spec
        assert spec.loader
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)


if not Path(__file__).with_name("recipes").is_dir():
    _find_packages_of_a_checkout()


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
