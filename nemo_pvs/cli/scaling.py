"""The verbs about equal terms and about what comes after a run: budget, scaling-fit, scaling-predict, advise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.text import Text

from nemo_pvs.api.values import one_of
from nemo_pvs.errors import UserError
from nemo_pvs.system.output_paths import check_file
from nemo_pvs.system.progress import console, progress, warn

if TYPE_CHECKING:
    from nemo_pvs.scaling.advise import Verdict
    from nemo_pvs.scaling.fit import Fit
    from nemo_pvs.scaling.held_out import HeldOut
    from nemo_pvs.scaling.predict import Prediction

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

QUESTIONS, MODEL = "Questions", "Model"
"""Panels of --help."""

_START = {"p2": "pruned", "chinchilla": "random", "per-run": "both"}
_SHOWN = 4


def budget(
    source: Annotated[str, typer.Argument(help="run folder, or path or name of a recipe")],
    setting: Annotated[
        str, typer.Option(help="equal-training-tokens, equal-total-tokens, equal-training-flops or equal-total-flops")
    ] = "equal-total-tokens",
    zeros_skipped: Annotated[bool, typer.Option(help="count no FLOPs for weights that a mask holds at zero")] = False,
) -> None:
    """Print what training from scratch must be given to be compared with pruning on equal terms."""
    from rich.table import Table

    from nemo_pvs.ledger.budget import parse_setting, scratch_budget
    from nemo_pvs.reporting.numbers import scientific

    wanted = parse_setting(setting)
    from nemo_pvs.planning.pruned_arms import pruned_arms  # takes seconds; a misspelt setting is answered before

    arms = pruned_arms(source)
    unit = "tokens" if wanted.endswith("tokens") else "FLOPs"
    headings = ("pruned arm", f"its {unit}", "scratch tokens", "scratch steps")
    table = Table(*headings, box=None, padding=(0, 2, 0, 0))
    for arm in arms:
        given = scratch_budget(arm, wanted, zeros_skipped=zeros_skipped)
        spent = f"{given.spent.tokens:,}" if unit == "tokens" else scientific(given.spent.flops)
        table.add_row(arm.name, spent, f"{given.trained_tokens:,}", f"{given.steps:,}")
    steps = " or ".join(f"{size:,}" for size in sorted({arm.tokens_per_step for arm in arms}))
    console.print(f"{wanted}, in whole steps of {steps} tokens:", soft_wrap=True)
    console.print(table)


def scaling_fit(
    runs: Annotated[
        list[str], typer.Argument(help="run folders, .csv tables, or published: the points of the paper's Figure 1")
    ],
    form: Annotated[str, typer.Option(help="p2, chinchilla or per-run (a curve for each run)")] = "per-run",
    initialisation: Annotated[
        Optional[str], typer.Option(help="pruned, random or both; what the form describes by default")
    ] = None,
    out: Annotated[
        str, typer.Option(help="file for the fit; the residual plot goes next to it, as .svg")
    ] = "fit.json",
    draws: Annotated[int, typer.Option(help="bootstrap draws for the intervals; at least 39")] = 399,
    seed: Annotated[int, typer.Option(help="for the starting points and the draws")] = 0,
) -> None:
    """Fit a scaling law to the validation losses of runs, and test it on points that it has not seen."""
    start = initialisation or _START[one_of("--form", form, tuple(_START))]
    one_of("--initialisation", start, ("pruned", "random", "both"))
    picture = Path(out).with_suffix(".svg")
    check_file(Path(out))
    check_file(picture)
    from nemo_pvs.scaling.fit import fit, save_fits
    from nemo_pvs.scaling.plot import write_figure
    from nemo_pvs.scaling.sources import read_series

    read = read_series(runs, warn)
    series = [one for one in read if start in ("both", one.initialisation)]
    if not series:
        raise UserError(f"There is no {start} arm with a validation loss in {', '.join(runs)}; give other runs.")
    groups = [[one] for one in series] if form == "per-run" else [series]
    fits = []
    for group in groups:
        with progress(f"fit {group[0].name if len(group) == 1 else form}", "draws") as show:
            fits.append(fit(form, group, draws=draws, seed=seed, progress=show))  # type: ignore[arg-type]
    save_fits(fits, Path(out))
    write_figure(fits, picture)
    for one in fits:
        _show_fit(one)
    console.print(f"\nFit: {out}, residuals: {picture}", soft_wrap=True)


def scaling_predict(
    fits: Annotated[str, typer.Argument(help="file of pvs scaling-fit")],
    tokens: Annotated[
        float,
        typer.Option(
            help="predict the loss after this many training tokens, e.g. 50e9; 0 to skip", rich_help_panel=QUESTIONS
        ),
    ] = 0.0,
    target_loss: Annotated[
        float, typer.Option(help="predict the tokens to this loss; 0 to skip", rich_help_panel=QUESTIONS)
    ] = 0.0,
    gain: Annotated[
        float,
        typer.Option(
            help="predict the tokens after which another billion gains fewer nats than this; 0 to skip",
            rich_help_panel=QUESTIONS,
        ),
    ] = 0.0,
    against: Annotated[
        Optional[str],
        typer.Option(
            help="predict when scratch catches up: name of a scratch run in the file, or the file of its fit",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    parent_tokens: Annotated[
        float,
        typer.Option(
            help="with --against: what scratch gets in addition, for equal total tokens", rich_help_panel=QUESTIONS
        ),
    ] = 0.0,
    run: Annotated[Optional[str], typer.Option(help="only this run of the file")] = None,
    params: Annotated[
        float, typer.Option(help="parameters of the model; for p2 and chinchilla", rich_help_panel=MODEL)
    ] = 0.0,
    parent_params: Annotated[
        float, typer.Option(help="parameters before pruning; for p2", rich_help_panel=MODEL)
    ] = 0.0,
    parent_loss: Annotated[
        float, typer.Option(help="loss before pruning, nats per token; for p2", rich_help_panel=MODEL)
    ] = 0.0,
) -> None:
    """Predict losses and tokens from a fit, each with its 95 % interval."""
    if not (tokens or target_loss or gain or against):
        raise UserError("Nothing to predict; give --tokens, --target-loss, --gain or --against.")
    from nemo_pvs.scaling.fit import load_fits
    from nemo_pvs.scaling.predict import extrapolation, loss_at, overtaking, tokens_at_gain, tokens_to
    from nemo_pvs.scaling.series import Conditions

    known = load_fits(Path(fits))
    size, before, loss_before = (value or math.nan for value in (params, parent_params, parent_loss))
    at = Conditions(size, before, 1 - size / before, loss_before)
    scratch = None if against is None else _scratch_fit(known, against)
    chosen = [one for one in known if one is not scratch and run in (None, one.name)]
    if scratch is not None:
        chosen = [one for one in chosen if one.series[0].initialisation == "pruned"]
    if not chosen:
        raise UserError(f"{fits} has no such run; it has {', '.join(one.name for one in known)}.")
    if scratch is not None and len(chosen) > 1:  # of a single run ``overtaking`` refuses it
        chosen = _with_tokens_of(scratch, chosen)
    for one in chosen:
        console.print(Text.assemble("\n", (one.name, "bold"), f" ({one.form})"), soft_wrap=True)
        found, doubts = [tokens] if tokens else [], list(one.warnings)
        if tokens:
            after = loss_at(one, tokens, at)
            console.print(f"  loss after {_tokens(tokens)}: {after.value:.3f} ({after.low:.3f} to {after.high:.3f})")
        if target_loss:
            needed = tokens_to(one, target_loss, at)
            console.print(f"  tokens to a loss of {target_loss:g}: {_interval(needed)}", soft_wrap=True)
            found.append(needed.value)
        if gain:
            flat = tokens_at_gain(one, gain, at)
            console.print(
                f"  another billion tokens gains less than {gain:g} nats from: {_interval(flat)}", soft_wrap=True
            )
            found.append(flat.value)
        if scratch is not None:
            met = overtaking(scratch, one, head_start=parent_tokens, scratch_at=at, pruned_at=at)
            best = f"not up to {_tokens(met.horizon)}"
            if met.tokens:
                best = f"at {'or before ' if met.tokens.value <= met.low else ''}{_interval(met.tokens)}"
                found.append(met.tokens.value)
                doubts += extrapolation(scratch, met.tokens.value + parent_tokens, at)
            console.print(
                f"  {scratch.name} catches up: {best}; it does in {met.share:.0%} of the draws", soft_wrap=True
            )
            sizes = [fit.series[0].parameters for fit in (one, scratch)]
            if one.form == "per-run" and sizes[0] != sizes[1]:
                sized = f"{one.name} has {sizes[0]:,} parameters, {scratch.name} {sizes[1]:,}"
                doubts.append(f"{sized}: two architectures")
        within = [one.range[1]]  # the model may be out of range where no number of tokens is asked for
        for count in [count for count in found if math.isfinite(count)] or within:
            doubts += extrapolation(one, count, at)
        for warning in dict.fromkeys(doubts):
            warn(warning, indent="  ")


def advise(
    params: Annotated[float, typer.Option(help="parameters of the small model, e.g. 4e9")],
    train_tokens: Annotated[float, typer.Option(help="training tokens that you can afford, e.g. 50e9")],
    parent_tokens: Annotated[
        float,
        typer.Option(help="tokens that the parent was pretrained on, e.g. 15e12; adds an answer that charges them"),
    ] = 0.0,
    parent_params: Annotated[float, typer.Option(help="parameters of the parent; twice --params by default")] = 0.0,
    runs: Annotated[
        Optional[list[str]], typer.Option(help="run folders of your own, the best evidence; repeatable")
    ] = None,
) -> None:
    """Say whether to prune or to train from scratch, with the evidence and how sure it is."""
    from nemo_pvs.scaling.advise import advise as answer
    from nemo_pvs.scaling.evidence import Question, runs_in, written

    own = runs_in(runs or [])
    question = Question(params, train_tokens, parent_params or 2 * params, parent_tokens or None)
    verdicts = answer(question, own)
    if not parent_params:
        console.print(f"Assuming a parent of {written(2 * params)} parameters; set another size with --parent-params.")
    for verdict in verdicts:
        _show_verdict(verdict)


def _show_fit(fit: Fit) -> None:
    about = f" ({fit.form}; parameters and tokens in billions)"
    console.print(Text.assemble("\n", (fit.name, "bold"), about), soft_wrap=True)
    intervals = fit.intervals
    for name, value in fit.parameters.items():
        low, high = intervals[name]
        console.print(f"  {name:6} {value:9.4g}  ({low:.4g} to {high:.4g})")
    points = sum(len(one.tokens) for one in fit.series)
    console.print(f"  {points} points, rmse {fit.rmse:.4f} nats, {_slope(fit.slope_difference)}", soft_wrap=True)
    for held in fit.held_out:
        if held.rmse is None:
            console.print(f"  without the {held.name}: {held.reason}", soft_wrap=True)
        else:
            count = "1 point" if held.points == 1 else f"{held.points} points"
            console.print(
                f"  without the {held.name} ({count}): rmse {held.rmse:.4f} nats, {_error(held)}, "
                f"{_slope(held.slope_difference)}",
                soft_wrap=True,
            )
    for warning in fit.warnings:
        warn(warning, indent="  ")


def _error(held: HeldOut) -> str:
    """Return the mean error of a law on points that it has not seen, with its interval."""
    assert held.error is not None
    if held.error_interval is None:
        return f"measured − predicted {held.error:+.4f}"
    low, high = held.error_interval
    return f"measured − predicted {held.error:+.4f} ({low:+.4f} to {high:+.4f})"


def _slope(difference: float | None) -> str:
    return "no slopes" if difference is None else f"ASD {difference:.3g} nats/B"


def _scratch_fit(fits: list[Fit], against: str) -> Fit:
    from nemo_pvs.scaling.fit import load_fits

    candidates = load_fits(Path(against)) if against.endswith(".json") else fits
    named = [one for one in candidates if against in (one.name, one.form) or against.endswith(".json")]
    if len(named) != 1:
        raise UserError(
            f"--against {against!r} should name one fit, not {len(named)}; there are "
            f"{', '.join(one.name for one in candidates)}."
        )
    return named[0]


def _with_tokens_of(scratch: Fit, fits: list[Fit]) -> list[Fit]:
    """Return the fits that can be compared with scratch, and say which have another tokenizer."""
    from nemo_pvs.scaling.fit import check_tokenizers

    comparable = []
    for one in fits:
        try:
            check_tokenizers([*scratch.series, *one.series])
        except UserError as error:
            warn(str(error))
        else:
            comparable.append(one)
    return comparable


def _tokens(count: float) -> str:
    return "never" if math.isinf(count) else f"{count / 1e9:.3g} B tokens"


def _interval(estimate: Prediction) -> str:
    return f"{_tokens(estimate.value)} ({_tokens(estimate.low)} to {_tokens(estimate.high)})"


_ANSWERS = {
    "prune": "prune",
    "scratch": "train from scratch",
    "either": "no clear difference",
    "unknown": "unknown",
}


def _show_verdict(verdict: Verdict) -> None:
    answer = _ANSWERS[verdict.choice] + (f", by {verdict.granularity}" if verdict.granularity else "")
    sure = "" if verdict.choice == "unknown" else f" ({verdict.sureness})"
    parent = "parent in hand" if verdict.setting == "equal training tokens" else "parent charged"
    console.print(f"\nAt {verdict.setting} ({parent}): {answer}{sure}", style="bold")
    console.print(f"  {verdict.summary}", soft_wrap=True)
    nearest = sorted(verdict.evidence, key=lambda one: one.out_of_reach.count(";") if one.out_of_reach else -1)
    shown = nearest if verdict.choice != "unknown" else nearest[:_SHOWN]
    for one in shown:
        better = f"{one.advantage:+.2f} {one.unit}"
        console.print(f"  {better:>12}  {one.statement} [{one.source}]", soft_wrap=True)
        if one.out_of_reach:
            console.print(f"  {'':12}  does not apply: {one.out_of_reach}", soft_wrap=True)
    if len(shown) < len(nearest):
        console.print(f"  and {len(nearest) - len(shown)} more that do not apply")
