"""Take the curves of arms that were trained elsewhere from training logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.results import Point, at
from nemo_pvs.reporting.training_log import log_files, validation_losses
from nemo_pvs.system.files import sha256_file, sha256_json

if TYPE_CHECKING:
    from nemo_pvs.reporting.compare.runs import Run


def take_curves(runs: Sequence[Run], curves: Sequence[str]) -> None:
    """Replace validation curves by those in training logs, for arms that were trained elsewhere.

    The loss before training is kept; the log's hash is added to the run's hashes.

    Args:
        runs: The runs; changed in place.
        curves: ``ARM=LOG`` each, with the arm's name in the report (``width, pruned``), or ``RUN: ARM`` if several
            runs have an arm of that name; LOG is the argument of ``training_log.validation_losses``.

    Raises:
        UserError: there is no such arm, or the log cannot be that of its run.
    """
    for text in curves:
        wanted, _, log = text.rpartition("=")
        named = []
        for run in runs:
            named += [(run, arm) for arm in run.results.arms if wanted in (arm.name, f"{run.label}: {arm.name}")]
        if len(named) != 1:
            known = ", ".join(f"'{run.label}: {arm.name}'" for run in runs for arm in run.results.arms)
            raise UserError(f"--curve {text!r} names {len(named)} arms; write ARM=LOG, with one of {known}.")
        [(run, arm)] = named
        losses = validation_losses(Path(log))
        size = at(run.results.recipe, "train", "global_batch_size"), at(run.results.recipe, "train", "sequence_length")
        if not all(size):
            raise UserError(f"{run.label} does not record how many tokens a step has, so {log} cannot be its log.")
        points = [Point(steps, steps * size[0] * size[1], loss) for steps, loss in losses.items()]
        trained = arm.ledger.training.tokens
        if trained is not None and points[-1].tokens > trained:
            raise UserError(
                f"{log} goes on to {points[-1].tokens:,} tokens, but {wanted} was trained on {trained:,}; is it the "
                "log of another run?"
            )
        arm.validation = [*(point for point in arm.validation if not point.tokens), *points]
        run.results.hashes[f"log of {arm.name}"] = sha256_json([sha256_file(file) for file in log_files(Path(log))])
