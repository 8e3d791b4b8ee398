"""The stages of a run folder on disk: each is run once, and again only if its inputs have changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.records import Record, RecordT
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.system.files import link_tree, read_json, remove_leftover, remove_whole, sha256_json, write_json
from nemo_pvs.system.progress import console, short_time


@dataclass(frozen=True)
class _Done:
    """A finished stage of this run."""

    name: str
    outputs: Sequence[Path]
    record: Record

    def again(self, outputs: Sequence[Path]) -> None:
        """Link the outputs to other paths."""
        for source, destination in zip(self.outputs, outputs, strict=True):
            remove_whole(destination)  # left by an attempt that was killed
            link_tree(source, destination)


class Stages:
    """The finished stages of one run folder, each with a small record that is written last.

    A stage is skipped if its record has the same inputs and its outputs still exist. A stage without a record
    (interrupted, killed) is run again. A shared stage that differs from a finished one only in its name is not run: it
    gets the same result and links to the same files.
    """

    def __init__(self, folder: Path, force: tuple[str, ...] | None = ()) -> None:
        """Open the stages of a run folder.

        Args:
            folder: The run folder.
            force: Stages to run again; None if the command that runs them cannot force any, as for a parent that
                other recipes share.
        """
        self.folder = folder
        self._force = force
        self._begun: set[str] = set()
        self._reported: set[str] = set()
        self._done: dict[tuple[str, str], _Done] = {}

    def run(
        self,
        stage: Stage[RecordT],
        work: Callable[[], RecordT] | None = None,
        worked: Callable[[], float] = lambda: 0.0,
    ) -> RecordT:
        """Run a stage, or read its result from the record.

        Args:
            stage: The stage.
            work: Called instead of ``stage.work``.
            worked: Returns how many seconds of the work were done before, by an interrupted attempt or ahead of the
                stage; the record includes them.

        Returns:
            The result of the work, now or earlier.

        Raises:
            UserError: a precious output would have to be removed.
        """
        name, inputs = stage.name, stage.inputs()
        record = self._begin(stage, inputs)
        if record is not None:
            if name not in self._reported:
                _say_done(name, f"done earlier, {short_time(record['seconds'])}")
            self._reported.add(name)
            earlier = stage.record.from_json(record["result"])
            self._done.setdefault(_kind_and_inputs(stage, inputs), _Done(name, stage.outputs, earlier))
            return earlier
        console.print(Text.assemble(("→", "bold"), f" {name}"))
        began = time.monotonic() - worked()
        twin = self._twin(stage, inputs)
        if twin is None:
            result = (work or stage.work)()
        else:
            twin.again(stage.outputs)
            assert isinstance(twin.record, stage.record)
            result = twin.record
        seconds = time.monotonic() - began
        write_json(
            self._record(name),
            {
                "stage": name,
                "inputs_hash": sha256_json(inputs),
                "inputs": inputs,
                "result": result.to_json(),
                "seconds": seconds,
            },
        )
        self._attempt(name).unlink()
        self._done.setdefault(_kind_and_inputs(stage, inputs), _Done(name, stage.outputs, result))
        _say_done(name, f"as {twin.name}" if twin else short_time(seconds))
        self._reported.add(name)
        return result

    def begin(self, stage: Stage[Any]) -> bool:
        """Return whether a stage must be run; if so, remove its outputs and record that it was begun.

        A stage that can link to the outputs of an equal one counts as done.

        Raises:
            UserError: a precious output would have to be removed.
        """
        inputs = stage.inputs()
        return self._begin(stage, inputs) is None and self._twin(stage, inputs) is None

    def _begin(self, stage: Stage[Any], inputs: Inputs) -> dict[str, Any] | None:
        """Return the record of a stage if it is done; else remove its outputs and record that it was begun."""
        name = stage.name
        forced = self._is_forced(name)
        record = read_json(self._record(name)) if self._record(name).exists() else {}
        if not forced and self.matches(record, inputs) and all(path.exists() for path in stage.outputs):
            return dict(record)
        begun = self.begun(name)
        if not (stage.keep_partial and self.matches(begun, inputs)) or forced:
            if begun:
                self.refuse(name, stage.precious, difference(begun, inputs))
            for path in [*stage.outputs, *(stage.reusable if forced else ())]:
                remove_whole(path)
        for path in stage.outputs:
            remove_leftover(path)
        self._begun.add(name)
        self._record(name).unlink(missing_ok=True)
        write_json(self._attempt(name), {"inputs_hash": sha256_json(inputs), "inputs": inputs})
        return None

    def _twin(self, stage: Stage[Any], inputs: Inputs) -> _Done | None:
        """Return a finished stage with the same kind and inputs, if results are shared."""
        return self._done.get(_kind_and_inputs(stage, inputs)) if stage.shared else None

    def begun(self, name: str) -> dict[str, Any]:
        """Return the record of the last attempt at a stage, with its ``result`` if done; empty if there is none."""
        for path in (self._attempt(name), self._record(name)):
            if path.exists():
                return dict(read_json(path))
        return {}

    def matches(self, begun: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
        """Return whether a stage was begun with these inputs."""
        return bool(begun and begun["inputs"] == _as_read(inputs))

    def refuse(self, name: str, precious: Sequence[Path], how: str) -> None:
        """Refuse to run a stage again if that removes precious outputs, unless it is forced.

        Args:
            name: Name of the stage.
            precious: Outputs that are only removed with ``--force``.
            how: The difference in inputs, for the message: what they were made with, and what is given now.

        Raises:
            UserError: one of the outputs exists.
        """
        costly = [path for path in precious if path.exists()]
        if costly and not self._is_forced(name):
            remedy = f"choose another --out, or --force {name} to remove it and start again"
            if self._force is None:
                remedy = f"remove {self.folder} to train it again, or choose an --out in another folder"
            raise UserError(f"{costly[0]} was made with {how}; {remedy}.")

    def _is_forced(self, name: str) -> bool:
        """Return whether a stage is to be run again; once begun, it is treated like any other."""
        if name in self._begun:
            return False
        return any(name == stage or name.startswith(f"{stage}/") for stage in self._force or ())

    def _record(self, name: str) -> Path:
        return self.folder / "stages" / f"{name.replace('/', '-')}.json"

    def _attempt(self, name: str) -> Path:
        return self._record(name).with_suffix(".begun.json")


def _as_read(inputs: Mapping[str, Any]) -> Any:
    """Return inputs as they are read from a record."""
    return json.loads(json.dumps(inputs))


def _kind_and_inputs(stage: Stage[Any], inputs: Inputs) -> tuple[str, str]:
    """Return the kind of a stage and the hash of its inputs, which equal stages have in common."""
    return stage.name.split("/")[0], sha256_json(inputs)


def difference(begun: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Describe the first difference between the inputs of an earlier attempt and the current ones."""
    return _difference(begun.get("inputs", {}), _as_read(inputs))


def _difference(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str:
    for key in (*now, *then):
        before, after = then.get(key), now.get(key)
        if before != after:
            if isinstance(before, Mapping) and isinstance(after, Mapping):
                return _difference(before, after, f"{where}{key}.")
            short = all(len(str(value)) < 32 for value in (before, after))
            return f"{where}{key} {before}, not {after}" if short else f"another {where}{key}"
    return "other settings"


def _say_done(name: str, how: str) -> None:
    console.print(Text.assemble(("✓", "green"), f" {name} ", (f"({how})", "dim")))
