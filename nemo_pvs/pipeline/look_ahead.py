"""What the stages of a run will find when their turn comes, seen from the records of those that were done before.

A run with another recipe than the one before must not replace anything and only then find out that it may not replace
what comes next. So every stage is looked at before the first one does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.pipeline.records import Stages, difference

Inputs = Mapping[str, Any]


class LookAhead:
    """Looks at stages in their order; ``results`` are those of the stages that will find the same as before.

    A stage that will be done with other inputs than before is changed, and so is every stage that is made from its
    result. What a stage will find that has no result yet is not known, and nothing that is made from it is judged.
    """

    def __init__(self, stages: Stages, results: dict[str, dict[str, Any]]) -> None:
        """Begin; ``results`` is filled while stages are looked at."""
        self.stages = stages
        self.results = results
        self._changed: dict[str, str] = {}

    def look(
        self,
        stage: str,
        inputs: Callable[[], Inputs],
        *,
        after: Sequence[str] = (),
        reads: Sequence[Path] = (),
        precious: Sequence[Path] = (),
        decisive: Callable[[Inputs], Any] = dict,
    ) -> None:
        """Look at a stage.

        Args:
            stage: Its name.
            inputs: Returns what it depends on; is asked when the results of ``after`` are known.
            after: The stages that it is made from.
            reads: Files or folders that ``inputs`` opens.
            precious: What it must not remove unasked.
            decisive: Which part of the inputs makes another result for certain if it differs.

        Raises:
            UserError: something precious would have to be removed.
        """
        begun = self.stages.begun(stage)
        why = next((self._changed[one] for one in after if one in self._changed), None)
        if why is None:
            if not begun or any(one not in self.results for one in after) or not all(map(Path.exists, reads)):
                return
            now = inputs()
            if self.stages.matches(begun, now):
                if "result" in begun:
                    self.results[stage] = begun["result"]
                return
            if decisive(begun["inputs"]) == decisive(now):
                return
            own = difference(begun, now)
            self.stages.refuse(stage, precious, own)
            if "result" in begun:  # else nobody knows what was made from it, or from one before
                self._changed[stage] = f"{own} (in {stage})"
            return
        self._changed[stage] = why
        if begun:
            self.stages.refuse(stage, precious, why)
