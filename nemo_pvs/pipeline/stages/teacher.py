"""The teacher stage: the parent with the tokens that a target keeps, so that both predict the same tokens."""

from __future__ import annotations

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.pipeline.folder import PLAN, RunFolder
from nemo_pvs.pipeline.records import TeacherRecord, prune_stage, teacher_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.vocabulary.choice import with_tokens_of
from nemo_pvs.system.progress import progress


def slice_teacher(run: RunFolder, name: str) -> Stage[TeacherRecord]:
    """Return the stage that writes the teacher of a target whose vocabulary is pruned.

    The teacher's probabilities of the kept tokens are those that it gives them, divided by their sum: a softmax over
    the kept rows of its output head.
    """
    folder = run.teacher_of(name)
    assert folder is not None

    def inputs() -> Inputs:
        return {"teacher": fingerprint(run.parent_source), "plan": run.records.pruned(name).plan}

    def work() -> TeacherRecord:
        plan = with_tokens_of(Plan.load(run.pruned(name) / PLAN))
        with progress(f"write teacher of {name}", "parameters") as show:
            write_huggingface(PrunedSource(run.parent_source, plan), folder, progress=show)
        return TeacherRecord(fingerprint(open_source(folder)))

    return Stage(
        name=teacher_stage(name),
        record=TeacherRecord,
        inputs=inputs,
        work=work,
        outputs=[folder],
        after=["parent", prune_stage(name)],
    )
