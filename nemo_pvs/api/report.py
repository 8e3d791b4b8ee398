"""Reporting finished runs, one or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pvs.system.output_paths import check_folder

if TYPE_CHECKING:
    from nemo_pvs.reporting.compare.runs import SideBySide


def report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    evaluation: str | Path | Sequence[str | Path] = (),
    curve: Sequence[str] = (),
    published: bool = False,
    non_inferior_to: str | None = None,
    margin: float | None = None,
    unit: str = "points",
    force: bool = False,
) -> SideBySide:
    """Write the report of finished runs, as page, Markdown, JSON and CSV.

    Args:
        folders: Run folders with ``results.json``; several are compared.
        out: The folder to write to; the run's own by default, or ``runs/report`` for several.
        evaluation: Folders that ``evaluate`` wrote, for the tasks of these runs' models.
        curve: ``ARM=LOG``: the arm's validation losses are in TensorBoard's folder, or in a CSV export of W&B.
        published: Show the paper's points next to the gaps.
        non_inferior_to: ``parent``: test whether each pruned model is as good as its parent, to within ``margin``.
        margin: The largest acceptable shortfall against the parent, in ``unit``.
        unit: ``points`` (per cent) of accuracy, repetition, distinct n-grams and agreement, or ``nats`` per token of
            validation loss and KL.
        force: Compare runs that are not comparable, and say so on the page.

    Returns:
        The runs side by side: ``results`` as the page shows them, ``warnings``, the paper's ``findings`` as these
        runs judge them, and ``recoveries``, the tests against the parent.

    Raises:
        UserError: a folder holds no finished run, the runs are not comparable, or the test against the parent is not
            possible.

    Example:
        >>> import nemo_pvs as pvs
        >>> comparison = pvs.report(finished, folder / "report")
        >>> arm = comparison.results.arms[0]
        >>> arm.name, round(comparison.results.gap(arm), 2)
        ('depth, pruned', 0.1)
    """
    runs = _list(folders)
    place = report_folder(runs, out)
    check_folder(place)
    from nemo_pvs.reporting.compare.compare import compare, read_runs, seeds_without_results
    from nemo_pvs.reporting.compare.curves import take_curves
    from nemo_pvs.reporting.compare.non_inferiority import check_margin, judge_non_inferiority
    from nemo_pvs.reporting.html import write_files

    tested = check_margin(non_inferior_to, margin, unit)
    read = read_runs(runs, _list(evaluation))
    take_curves(read, curve)
    absent = [seed for folder in runs for seed in seeds_without_results(Path(folder))]
    found = compare(read, absent=absent, force=force)
    if tested is not None:
        found = replace(found, recoveries=judge_non_inferiority(found, *tested))
    write_files(found, place, reference=published)
    return found


def report_folder(folders: Sequence[str | Path], out: str | Path | None) -> Path:
    """Return where the report of runs goes."""
    return Path(out or (folders[0] if len(folders) == 1 else "runs/report"))


def _list(paths: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(paths)] if isinstance(paths, (str, Path)) else [str(path) for path in paths]
