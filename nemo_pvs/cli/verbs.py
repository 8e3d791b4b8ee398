"""What ``pvs`` can do: one plain function per verb, used by the command line, by ``nemo pvs`` and from Python.

Arguments are primitives, so that NeMo-Run can carry them to a cluster. Heavy modules are imported inside the
functions: ``pvs --help`` starts in about a second.
"""

from __future__ import annotations

from nemo_pvs.cli.checkpoints import convert, inspect
from nemo_pvs.cli.doctor import doctor
from nemo_pvs.cli.evaluation import evaluate
from nemo_pvs.cli.methods import methods
from nemo_pvs.cli.pruning import calibrate, prune
from nemo_pvs.cli.recipes import recipes
from nemo_pvs.cli.results import report, run
from nemo_pvs.cli.scaling import advise, budget, scaling_fit, scaling_predict
from nemo_pvs.cli.search import search
from nemo_pvs.cli.training import teach, tokenize, tokenizer, train

VERBS = (
    doctor,
    convert,
    inspect,
    tokenizer,
    tokenize,
    calibrate,
    search,
    methods,
    prune,
    teach,
    train,
    evaluate,
    recipes,
    run,
    report,
    budget,
    scaling_fit,
    scaling_predict,
    advise,
)
