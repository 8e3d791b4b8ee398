"""The teacher caches that the arms of a recipe share: which tokens they cover, who is charged for them, their size.

The teacher reads each token once, however many arms learn from its answers. Its cost is charged once to the comparison
and shared by the arms that read a cache in proportion to the tokens that they read: every token that an arm trains on
costs it the same fraction of a forward pass of the teacher, which is ``teacher_share``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from nemo_pvs.data.teacher_cache import bytes_per_token
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.recipe import Arm, Recipe


@dataclass(frozen=True)
class CachedRange:
    """Tokens [first, end) in training order, from which at least one arm learns, without gaps."""

    first: int
    end: int
    arms: tuple[Arm, ...]
    """The arms that read them."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.end - self.first


def cached_ranges(recipe: Recipe) -> list[CachedRange]:
    """Return what the caches of a recipe cover, in order; arms whose tokens overlap share one.

    Raises:
        UserError: the budget of an arm is not known yet (``Recipe.runs``).
    """
    cache = recipe.train.distill and recipe.train.distill.cache
    if not cache:
        return []
    ranges: list[CachedRange] = []
    for arm in sorted((arm for arm in recipe.runs if arm.training.distill), key=lambda arm: arm.first_token):
        end = arm.first_token + arm.tokens
        if ranges and arm.first_token < ranges[-1].end:
            before = ranges.pop()
            ranges.append(CachedRange(before.first, max(before.end, end), (*before.arms, arm)))
        else:
            ranges.append(CachedRange(arm.first_token, end, (arm,)))
    return ranges


def teacher_share(recipe: Recipe) -> Fraction:
    """Return how much of a forward pass of the teacher each training token of a distilled arm is charged.

    Without a cache this is 1. With caches it is the number of tokens that the teacher reads by the number that the
    arms read: 1/2 for two arms on the same tokens.

    Raises:
        UserError: the budget of an arm is not known yet.
    """
    ranges = cached_ranges(recipe)
    if not ranges:
        return Fraction(1)
    return Fraction(sum(part.tokens for part in ranges), sum(arm.tokens for part in ranges for arm in part.arms))


def teaching_layout(recipe: Recipe) -> Parallelism:
    """Return how the teacher of a recipe with a cache is spread over ranks to fill it."""
    cache = recipe.train.distill and recipe.train.distill.cache
    layout = (cache and cache.layout) or recipe.layout
    names = ("tensor_parallel", "pipeline_parallel", "data_parallel", "micro_batch_size")
    return Parallelism(**{name: getattr(layout, name) for name in names})


def check_cached_recipe(recipe: Recipe, teacher: Shape) -> None:
    """Refuse a recipe whose arms cannot share a cache.

    Raises:
        UserError: the order of the text depends on more than the seed, arms are pruned in rounds, or the layout does
            not divide the teacher.
    """
    cache = recipe.train.distill and recipe.train.distill.cache
    if not cache:
        return
    if recipe.data.domains:
        raise UserError(
            "train.distill.cache does not work with text in domains, where the losses of each arm decide which tokens "
            "it reads; leave cache out."
        )
    files = recipe.data.token_files
    if files and len(files.blend[1]) > 1:
        raise UserError(
            "train.distill.cache needs a single training file, as the order of several depends on each arm's budget; "
            "join them, or leave cache out."
        )
    for name, target in recipe.targets.items():
        if target.stages and recipe.distills(name, "pruned"):
            raise UserError(
                f"targets.{name}.stages: training between rounds of pruning begins before the tokens of all arms are "
                "known, so it cannot read a cache; leave out stages, or train.distill.cache."
            )
    layout = teaching_layout(recipe)
    try:
        teacher.check_parallel(tensor_parallel=layout.tensor_parallel, pipeline_parallel=layout.pipeline_parallel)
    except UserError as error:
        raise UserError(f"The teacher must fit on the ranks of train.distill.cache.layout: {error}") from None


def describe_caches(recipe: Recipe, teacher: Shape, folder: Path) -> list[str]:
    """Describe the caches of a settled recipe for its dry run: size, worth, and a warning if the disk is too small.

    Args:
        recipe: The recipe.
        teacher: Shape of the teacher.
        folder: The run folder, which need not exist.

    Returns:
        Lines; none without caches.
    """
    cache = recipe.train.distill and recipe.train.distill.cache
    ranges = cached_ranges(recipe)
    if not cache or not ranges:
        return []
    each = bytes_per_token(teacher.vocab, min(cache.top_k, teacher.vocab), cache.precision)
    needed = each * sum(part.tokens for part in ranges)
    logits = 4 * teacher.vocab
    lines = [
        f"teacher cache: the {min(cache.top_k, teacher.vocab)} most likely tokens in {cache.precision}, {each:,} "
        f"bytes per token ({logits / each:,.0f} times less than fp32 logits), {_bytes(needed)} in all; "
        f"{_bytes(each * 10**9)} for each billion tokens",
    ]
    online = sum(arm.tokens for part in ranges for arm in part.arms)
    saved = online - sum(part.tokens for part in ranges)
    share = teacher_share(recipe)
    if saved:
        lines.append(
            f"the teacher reads {online - saved:,} tokens once instead of {online:,} in its arms; each token of an "
            f"arm is charged {float(share):.3g} of its forward pass"
        )
    else:
        lines.append(
            "the teacher reads as many tokens as online, because no two arms read the same ones; a cache saves work "
            "only if they do"
        )
    if warning := disk_warning(needed, folder):
        lines.append(warning)
    return lines


def disk_warning(needed: float, folder: Path) -> str | None:
    """Return a warning if a cache of this size does not fit on the disk of a folder, which need not exist."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return None
    return (
        f"! the teacher's answers need {_bytes(needed)}, but {folder} has {_bytes(free)} "
        "free; keep fewer tokens (top_k), or choose an --out on a larger disk"
    )


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.3g} {unit}"
    return f"{number / 1e3:,.3g} kB"
