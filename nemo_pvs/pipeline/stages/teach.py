"""The teach stage: the teacher's answers to the tokens that distilled arms read, computed once for all of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.teacher_cache import TeacherCache
from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import TaughtRecord, teach_stage
from nemo_pvs.pipeline.stage import TrainingStage
from nemo_pvs.planning.cached_teacher import CachedRange, cached_ranges, teaching_layout
from nemo_pvs.planning.teacher import teacher_shape
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.system.files import sha256_json
from nemo_pvs.system.progress import console
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.teaching_job import TeachingJob, content_for


def teach(run: RunFolder, number: int, tokens: CachedRange) -> TrainingStage[TaughtRecord]:
    """Return the stage that writes one of a run's caches, counted from 1; the budgets of all arms are known."""

    def job() -> TeachingJob:
        return teaching_job(run, number, tokens)

    return TrainingStage(
        name=teach_stage(number),
        record=TaughtRecord,
        inputs=lambda: {**asdict(job().content), "arithmetic": job().precision},
        job=job,
        prepare=lambda: job().save(),
        work=lambda: _taught(job()),
        outputs=[_folder(run, number)],
        after=["parent", "data"],
        precious=[_folder(run, number)],
        keep_partial=True,
    )


def _taught(job: TeachingJob) -> TaughtRecord:
    kept = TeacherCache.open(job.folder).kept_probability()
    console.print(f"  the {job.content.top_k} tokens that are kept hold {kept:.1%} of the teacher's probability")
    return TaughtRecord(sha256_json(asdict(job.content)), kept)


def teaching_job(run: RunFolder, number: int, tokens: CachedRange) -> TeachingJob:
    """Return the job that writes a cache."""
    arm, teacher = tokens.arms[0], run.teacher_path
    how = arm.training.distill
    shape, text = teacher_shape(run.recipe, run.parent_shape), run.tokens.training_paths
    data = run.tokens.training_file(run.records.data.splits)
    assert how is not None
    assert how.cache is not None
    assert teacher is not None
    assert shape is not None
    assert data is not None  # blends and domains were refused
    assert not isinstance(text, dict)
    layout = teaching_layout(run.recipe)
    return TeachingJob(
        name=teach_stage(number),
        folder=_folder(run, number),
        teacher=teacher.resolve(),
        text=text if isinstance(text, str) else text[-1],
        index=run.job(arm).index,
        content=content_for(
            arm.training,
            tokens.first,
            tokens.end,
            teacher=fingerprint(open_source(teacher)),
            tokenizer=tokenizer_hash(run.tokenizer),
            data=data,
            vocab=shape.vocab,
            top_k=how.cache.top_k,
            precision=how.cache.precision,
        ),
        layout=layout,
        micro_batch_size=layout.micro_batch_size or arm.training.micro_batch_size,
        precision=arm.training.precision,
    )


def reading_cache(run: RunFolder, arm: Arm, job: TrainingJob) -> TrainingJob:
    """Return an arm's job with the cache that its teacher's answers are read from, if it has one."""
    for number, tokens in enumerate(cached_ranges(run.recipe), 1):
        if arm.name in (reader.name for reader in tokens.arms):
            return replace(job, cache=_folder(run, number))
    return job


def check_cache(run: RunFolder, arm: Arm) -> None:
    """Refuse to train an arm from a cache that is incomplete or another one's.

    Raises:
        UserError: saying what is missing or differs.
    """
    for number, tokens in enumerate(cached_ranges(run.recipe), 1):
        if arm.name in (reader.name for reader in tokens.arms):
            job, length = teaching_job(run, number, tokens), arm.training.sequence_length
            end = arm.first_token + arm.tokens
            needed = replace(job.content, first=arm.first_token // length, end=end // length)
            TeacherCache.open(job.folder).check_serves(needed)


def _folder(run: RunFolder, number: int) -> Path:
    return run.folder.resolve() / "teacher" / str(number)
