"""A grid of runs that never was: five targets at two ratios and three budgets, with one run per seed."""

from __future__ import annotations

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.results import ArmResult, ParentResult, Point, Results

PARENT = Shape(layers=8, hidden=48, ffn=144, heads=8, kv_groups=4, head_dim=6, vocab=2048, tied=True)
STEP = 2048
PRETRAINING = 3200 * STEP
BUDGETS = (160 * STEP, 480 * STEP, 800 * STEP)
OF_TOTAL = PRETRAINING + BUDGETS[-1]

TARGETS: dict[str, tuple[str, Shape, int, str | float | None]] = {
    "depth-50": ("minitron-depth", PARENT.replace(layers=4), 0, None),
    "depth-75": ("minitron-depth", PARENT.replace(layers=2), 0, None),
    "width-50": ("minitron-width", PARENT.replace(hidden=32, ffn=112), 0, None),
    "wanda-50": ("wanda", PARENT, 110_000, 0.5),
    "wanda-2-4": ("wanda", PARENT, 110_000, "2:4"),
}
GAPS = {
    "depth-50": (1.7, 1.2, 0.9),
    "depth-75": (1.5, 1.0, 0.6),
    "width-50": (1.9, 1.4, 1.1),
    "wanda-50": (1.8, 1.3, 1.0),
    "wanda-2-4": (1.75, 1.3, 1.0),
}
"""Mean gap at equal training tokens by budget, nats per token."""
OF_TOTAL_GAPS = {"depth-50": -0.2, "depth-75": -0.3, "width-50": 0.005, "wanda-50": 0.1, "wanda-2-4": 0.08}
NOISE = {1: -0.01, 2: 0.0, 3: 0.01}
"""What a seed adds to every gap; a second seed-dependent part cancels in the difference of paired arms."""
SHARED = {1: 0.3, 2: -0.2, 3: 0.1}


def grid_run(seed: int) -> Run:
    """Return the run with one seed."""
    arms = []
    for target, (method, shape, masked, _) in TARGETS.items():
        for index, budget in enumerate(BUDGETS):
            pruned = 4.5 - 0.2 * index + SHARED[seed]
            arms.append(_arm(target, method, shape, masked, budget, pruned, pruned=True))
            scratch = pruned + GAPS[target][index] + NOISE[seed]
            arms.append(_arm(target, method, shape, masked, budget, scratch, pruned=False))
        last = 4.5 - 0.4 + SHARED[seed] + OF_TOTAL_GAPS[target] + NOISE[seed]
        arms.append(_arm(target, method, shape, masked, OF_TOTAL, last, pruned=False))
    targets = {}
    for target, (method, _, _, sparsity) in TARGETS.items():
        targets[target] = {"method": method, **({} if sparsity is None else {"sparsity": sparsity})}
    results = Results(
        title="All methods in small",
        recipe_name="tiny/grid",
        recipe={"targets": targets, "train": {"seed": seed, "global_batch_size": 16}, "data": {"seed": 0}},
        created="2026-11-29T10:00:00+00:00",
        environment={"torch": "2.13.0"},
        hashes={"recipe": "ab" * 32},
        parent=ParentResult("tiny parent", PARENT, validation_loss=3.8 + SHARED[seed], test_perplexity=45.0),
        arms=arms,
    )
    return Run(f"runs/grid/seed-{seed}", results)


def grid_runs(*seeds: int) -> list[Run]:
    """Return a run for each seed."""
    return [grid_run(seed) for seed in seeds or (1, 2, 3)]


def _arm(target: str, method: str, shape: Shape, masked: int, tokens: int, loss: float, *, pruned: bool) -> ArmResult:
    ledger = Ledger()
    if pruned:
        ledger.charge("parent pretraining", PRETRAINING, PARENT, 128, training=True)
        ledger.charge("calibration", 8 * STEP, PARENT, 128, training=False)
    ledger.charge("training", tokens, shape, 128, training=True, masked_parameters=masked, tokens_per_step=STEP)
    start = "pruned" if pruned else "random"
    return ArmResult(
        name=f"{target}, {start}, {tokens}",
        target=target,
        method=method,
        initialisation="pruned" if pruned else "random",
        shape=shape,
        masked_parameters=masked,
        validation=[Point(0, 0, 7.6), Point(tokens // STEP, tokens, loss)],
        test_perplexity_after=60.0,
        ledger=ledger,
    )
