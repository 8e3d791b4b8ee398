"""The teacher of a recipe's distilled arms: its shape, its cost and its checks. Does not use NeMo.

Every distilled arm is charged for its teacher, whatever its initial weights: for the teacher's forward pass over each
training token, and for the teacher's own pretraining. Arms that read a cache share the forward pass
(``cached_teacher``).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.cached_teacher import check_cached_recipe, teacher_share
from nemo_pvs.planning.charges import charge_teacher_passes
from nemo_pvs.planning.checks import check_context
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.distillation import PARENT, Distillation
from nemo_pvs.recipe.fields import Initialisation, Parallelism
from nemo_pvs.recipe.options import vocabulary_of
from nemo_pvs.recipe.recipe import Arm, Recipe


def teacher_shape(recipe: Recipe, parent: Shape) -> Shape | None:
    """Return the shape of a recipe's teacher; None without distillation.

    Raises:
        UserError: the teacher is not the parent, and its checkpoint cannot be opened.
    """
    distill = recipe.train.distill
    if distill is None:
        return None
    return parent if distill.teacher == PARENT else shape_of(open_source(distill.teacher))


def charge_teacher(
    ledger: Ledger, recipe: Recipe, arm: Arm, parent: Shape, student: Shape, share: Fraction | None = None
) -> None:
    """Charge a distilled arm for its teacher, and other arms nothing.

    Args:
        ledger: Gets the charge.
        recipe: The recipe.
        arm: One of its arms.
        parent: Shape of its parent.
        student: The arm's final shape.
        share: Part of a forward pass that a token of an arm that reads a cache is charged; by default
            ``teacher_share`` of the recipe, for which all budgets must be known.
    """
    teacher = teacher_shape(recipe, parent) if arm.training.distill else None
    if not teacher or not arm.training.distill:
        return
    if not arm.training.distill.cache:
        share = None
    elif share is None:
        share = teacher_share(recipe)
    charge_teacher_passes(ledger, arm.training, teacher, student, share)


def inherit_ancestors(
    ledger: Ledger, recipe: Recipe, target: str, initialisation: Initialisation, parent: Shape
) -> None:
    """Charge the models that an arm is made from: the parent of pruned weights and the teacher, each once.

    Raises:
        UserError: a model's ledger contradicts the recipe.
    """
    distill = recipe.train.distill if recipe.distills(target, initialisation) else None
    if initialisation == "pruned" or (distill and distill.teacher == PARENT):
        source = Path(recipe.parent.source) if recipe.parent.source else None
        stated = int(recipe.parent.pretraining_tokens) or None
        has_ledger = source is not None and Ledger.of_checkpoint(source) is not None
        ledger.inherit_checkpoint(source, parent, stated if has_ledger else recipe.parent_tokens)
    if distill and distill.teacher != PARENT:
        teacher = teacher_shape(recipe, parent)
        assert teacher is not None
        ledger.inherit_checkpoint(Path(distill.teacher), teacher, int(distill.pretraining_tokens) or None)


def check_recipe_teacher(recipe: Recipe, parent: Shape) -> None:
    """Refuse a recipe whose teacher does not fit its targets.

    Raises:
        UserError: naming the target, or saying that the teacher cannot be opened.
    """
    teacher = teacher_shape(recipe, parent)
    if teacher:
        check_cached_recipe(recipe, teacher)
    cached = bool(recipe.train.distill and recipe.train.distill.cache)
    if teacher and recipe.train.distill and recipe.train.distill.teacher != PARENT:
        check_teacher_context(recipe.train.distill.teacher, recipe.train.sequence_length, "train.sequence_length")
    for name, target in recipe.targets.items():
        if teacher and any(recipe.distills(name, initialisation) for initialisation in recipe.arms_of(name)):
            try:
                student, size = parent, vocabulary_of(target)
                if size is not None:
                    if cached:
                        raise UserError(
                            "with vocab the text has other tokens than those that a cache answers; leave "
                            "train.distill.cache or vocab out, or set distill: false for the target."
                        )
                    if recipe.train.distill and recipe.train.distill.teacher != PARENT:
                        raise UserError(
                            "with vocab only the parent can be the teacher, as its tokens are removed too; give "
                            "teacher: parent, set distill: false for the target, or leave vocab out."
                        )
                    student = parent.replace(vocab=size)
                check_teacher(teacher if size is None else student, student, target.layout, cached=cached)
                if recipe.train.distill:
                    check_pairs(recipe.train.distill, teacher, expected_shape(target, parent).shape)
            except UserError as error:
                raise UserError(f"Target {name}: {error}") from None


def check_teacher(teacher: Shape, student: Shape, layout: Parallelism, *, cached: bool = False) -> None:
    """Refuse a teacher that cannot run on its student's ranks or be compared with it token by token.

    Args:
        teacher: Shape of the teacher.
        student: Shape of the student, of which only the vocabulary counts.
        layout: The student's layout.
        cached: Whether the teacher's answers are read from a cache, so that it does not run on the student's ranks.

    Raises:
        UserError: the vocabularies differ, the layout does not divide the teacher, or there is context parallelism.
    """
    if teacher.vocab != student.vocab:
        raise UserError(
            f"The teacher's vocabulary has {teacher.vocab:,} tokens and the student's {student.vocab:,}; give a "
            "teacher with the student's vocabulary."
        )
    if layout.context_parallel > 1:
        raise UserError(
            f"Distillation does not support context_parallel {layout.context_parallel}; set it to 1, or train without "
            "distillation."
        )
    if cached:
        return
    try:
        teacher.check_parallel(tensor_parallel=layout.tensor_parallel, pipeline_parallel=layout.pipeline_parallel)
    except UserError as error:
        raise UserError(f"The teacher must fit on its student's ranks: {error}") from None


def check_pairs(distill: Distillation, teacher: Shape, student: Shape) -> None:
    """Refuse pairs with layers that the teacher or the student does not have.

    Raises:
        UserError: naming the pair.
    """
    for pair in distill.layer_pairs:
        for whose, layer, shape in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if layer > shape.layers:
                raise UserError(
                    f"layer_pairs compares layers {pair[0]} and {pair[1]} of student and teacher, but the {whose} has "
                    f"{shape.layers} layers; choose pairs within both."
                )


def check_teacher_context(teacher: str, length: int, what: str) -> None:
    """Refuse sequences longer than the teacher's context; ``what`` is the key or option with the length.

    Raises:
        UserError: naming both lengths.
    """
    context = int(open_source(teacher).config.get("max_position_embeddings", 0))
    check_context(length, context, what, f"teacher {teacher}")


def check_tokens(teacher: Path, student: Path) -> None:
    """Refuse a teacher whose tokenizer differs from the student's.

    Args:
        teacher: Checkpoint of the teacher.
        student: Checkpoint of the student, or a folder with its tokenizer.

    Raises:
        UserError: naming a token that differs.
    """
    ours, theirs = (load_tokenizer(tokenizer_folder(folder)).get_vocab() for folder in (student, teacher))
    different = ours.items() ^ theirs.items()
    if different:
        token, number = min(different, key=lambda pair: (pair[1], pair[0]))
        raise UserError(
            f"The tokenizers of teacher {teacher} and student differ, first at token {number} ({token!r}); give a "
            "teacher with the student's tokenizer."
        )
