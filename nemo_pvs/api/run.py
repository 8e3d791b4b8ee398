"""Running a recipe: a whole comparison of pruning with training from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pvs.api.values import AUTO, compute_of
from nemo_pvs.errors import UserError
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.output_paths import check_folder

if TYPE_CHECKING:
    from nemo_pvs.pipeline.series import RunSeries
    from nemo_pvs.reporting.results import Results


def run(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    force: Sequence[str] = (),
    jobs: int | None = None,
    so_far: bool = False,
    ignore_manifest: bool = False,
) -> Results:
    """Run a recipe: calibrate, prune, train every arm, evaluate, report; an interrupted run is resumed.

    Args:
        recipe: Path of a recipe, name of a packaged one (``smollm2_135m/demo``), or what ``load_recipe`` returned.
        out: The run folder; ``runs/<recipe name>`` by default.
        force: Stages to do again: ``calibrate``, ``prune/width``, ``train``, ...
        jobs: Number of arms to train at the same time, with one thread per rank and an equal share of the GPUs each;
            it does not change the results. By default one at a time, with all cores and GPUs.
        so_far: Train nothing; measure and report the arms whose training is finished, and list the others as missing.
        ignore_manifest: Read weights that differ from their manifest.

    Returns:
        What the report in the run folder shows; the means over the seeds if the recipe has ``seeds``.

    Raises:
        UserError: the recipe asks for something that cannot be done; raised before any work starts.
        TrainingError: a rank failed, or a training was asked to stop; it names the log.

    Example:
        >>> import nemo_pvs as pvs
        >>> results = pvs.run(recipe, folder / "comparison")
        >>> [(arm.name, arm.ledger.training.tokens) for arm in results.arms]
        [('width, pruned', 64), ('width, random', 64)]
    """
    check_jobs(jobs)
    if so_far and force:
        raise UserError("so_far trains nothing; leave out force.")
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out or f"runs/{checked.name}")
    check_folder(folder)
    with locked_folder(folder):
        series = _series(checked, folder, force, jobs)
        from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

        with ignoring_manifests(ignore_manifest):
            return series.run_so_far() if so_far else series.run()


def prepare(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    force: Sequence[str] = (),
    ignore_manifest: bool = False,
) -> list[Path]:
    """Do every stage before training, for ranks that something else starts, such as Slurm.

    Args:
        recipe: As for ``run``.
        out: As for ``run``.
        force: As for ``run``.
        ignore_manifest: As for ``run``.

    Returns:
        The job files to train. Where masks are to be learned, or targets are trained between rounds of pruning, these
        are the first jobs; call it again when they are done.

    Raises:
        UserError: as for ``run``.
    """
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out or f"runs/{checked.name}")
    check_folder(folder)
    with locked_folder(folder):
        series = _series(checked, folder, force)
        from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

        with ignoring_manifests(ignore_manifest):
            return series.prepare_only()


def check_jobs(jobs: int | None) -> None:
    """Check the number of trainings at the same time.

    Raises:
        UserError: it is not positive.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}, but at least one arm must be trained at a time; give 1 or more.")


def _series(recipe: Recipe, folder: Path, force: Sequence[str], jobs: int | None = None) -> RunSeries:
    from nemo_pvs.pipeline.series import RunSeries  # takes seconds; what was checked before is answered at once

    return RunSeries(recipe, folder, force, compute_of(None, AUTO), jobs)
