"""Collect what the stages of a run measured into the Results that the report shows."""

from __future__ import annotations

import os
import platform
import statistics
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.pipeline import Pipeline, arm_name
from nemo_pvs.recipe import Target
from nemo_pvs.reporting.ledger import Charge, Ledger
from nemo_pvs.reporting.results import ArmResult, ParentResult, Point, Results
from nemo_pvs.training import metrics

_PACKAGES = ("nemo-pvs", "nemo-toolkit", "megatron-core", "torch", "transformers", "numpy")


def assemble(run: Pipeline) -> Results:
    """Return the results of a run whose stages are done."""
    recipe, done = run.recipe, run.results
    parent = run.parent_source
    measured = done["evaluate/parent"]
    return Results(
        title=recipe.title,
        recipe_name=recipe.name,
        recipe=recipe.model_dump(),
        created=datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        environment=_environment(),
        hashes=_hashes(done),
        parent=ParentResult(
            name=recipe.parent.source,
            shape=shape_of(parent),
            validation_loss=measured["validation"]["loss"],
            test_perplexity=measured["test"]["perplexity"],
        ),
        arms=[
            _arm(run, name, target, initialisation)
            for name, target in recipe.targets.items()
            for initialisation in recipe.arms
        ],
    )


def _arm(run: Pipeline, name: str, target: Target, initialisation: Any) -> ArmResult:
    arm = arm_name(name, initialisation)
    curve = metrics.read(run.job(name, target, initialisation).metrics)
    before, after = run.results[f"evaluate/{arm}-initial"], run.results[f"evaluate/{arm}"]
    shape = shape_of(open_source(run.model(arm)))
    speeds = [point["tokens_per_second"] for point in curve.training]
    return ArmResult(
        name=f"{name}, {initialisation}",
        target=name,
        method=target.method,
        initialisation=initialisation,
        shape=shape,
        parallel={
            "tensor": target.layout.tensor_parallel,
            "pipeline": target.layout.pipeline_parallel,
            "data": target.layout.data_parallel,
        },
        validation=[
            Point(0, 0, before["validation"]["loss"]),
            *(Point(point["step"], point["tokens"], point["loss"]) for point in curve.validation),
        ],
        training=[
            Point(point["step"], point["tokens"], point["loss"], point["learning_rate"]) for point in curve.training
        ],
        test_perplexity_before=before["test"]["perplexity"],
        test_perplexity_after=after["test"]["perplexity"],
        ledger=_ledger(run, name, initialisation, arm),
        seconds=sum(run.recipe.train.tokens_per_step / speed for speed in speeds),
        tokens_per_second=statistics.median(speeds),
    )


def _ledger(run: Pipeline, name: str, initialisation: str, arm: str) -> Ledger:
    """Charge an arm with its training and, when it was pruned, with all that went into its initial weights."""
    recipe, ledger = run.recipe, Ledger()
    if initialisation == "pruned":
        parent = shape_of(run.parent_source)
        ledger.charge(
            "parent pretraining",
            int(recipe.parent.pretraining_tokens) or None,
            parent,
            0,
            True,
            "as declared in the recipe",
        )
        length = recipe.calibrate.sequence_length
        ledger.charge("calibration", run.results["calibrate"]["tokens"], parent, length, False, "one dense pass")
        if search := run.results[f"prune/{name}"].get("search"):
            ledger.charges.append(Charge("search", search["tokens"], search["flops"], "depth scan, prefixes shared"))
    training = recipe.train
    shape = shape_of(open_source(run.model(arm)))
    ledger.charge(
        "training", training.steps * training.tokens_per_step, shape, training.sequence_length, True, "this run"
    )
    return ledger


def _hashes(done: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the content hash of every artefact of the run."""
    hashes = {"parent weights": done["parent"]["fingerprint"], "scores": done["calibrate"]["scores"]}
    hashes |= {f"{split} tokens": made["bin_sha256"] for split, made in done["data"]["splits"].items()}
    hashes |= {f"plan {stage.split('/')[1]}": made["plan"] for stage, made in done.items() if "plan" in made}
    hashes |= {
        f"model {stage.split('/')[1]}": made["fingerprint"]
        for stage, made in done.items()
        if stage.startswith("train/")
    }
    return hashes


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
