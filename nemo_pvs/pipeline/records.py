"""Stages: steps of a run that are done once, and again only when what they were made from has changed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import same_inputs
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import link_tree, read_json, sha256_json, write_json
from nemo_pvs.system.progress import console


@dataclass(frozen=True)
class _Done:
    """A finished stage of this run."""

    name: str
    outputs: list[Path]
    result: dict[str, Any]

    def again(self, outputs: list[Path]) -> dict[str, Any]:
        """Make its outputs once more, in other places, and return its result."""
        for made, wanted in zip(self.outputs, outputs, strict=True):
            if wanted.exists():  # of an attempt that was killed
                shutil.rmtree(wanted)
            link_tree(made, wanted)
        return dict(self.result)


class Stages:
    """The finished stages of one run folder, a small record each; a record is written last.

    A stage is skipped when its record was made from the same inputs and its outputs are still there. One without a
    record (interrupted, killed) is done again. One that differs from an earlier stage in nothing but its name is not
    done: it gets the same result and the same files.
    """

    def __init__(self, folder: Path, force: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self._force = force
        self._done: dict[tuple[str, str], _Done] = {}

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: list[Path],
        work: Callable[[], Mapping[str, Any]],
        *,
        keep_partial: bool = False,
        precious: Sequence[Path] = (),
        shared: bool = False,
    ) -> dict[str, Any]:
        """Do a stage, or take its result from the record.

        Args:
            name: ``calibrate``, or ``prune/width`` for one of several; ``--force prune`` means all of them.
            inputs: settings and hashes of what the stage reads, as plain data.
            outputs: files or folders that it makes; leftovers are removed before it starts.
            work: does it, and returns the result as plain data.
            keep_partial: the stage resumes by itself from what an interrupted attempt at the same inputs left.
            precious: of the outputs what took long; made from other inputs it is not removed unasked.
            shared: a stage of the same kind (what is before the slash) with the same inputs makes the same.

        Returns:
            What ``work`` returned, now or earlier.

        Raises:
            UserError: something precious is in the way.
        """
        this = (name.split("/")[0], sha256_json(inputs))
        record = self.begin(name, inputs, outputs, keep_partial=keep_partial, precious=precious)
        if record is not None:
            console.print(f"[green]✓[/] {name} [dim](done earlier, {record['seconds']:.0f} s)[/]")
            self._done.setdefault(this, _Done(name, outputs, record["result"]))
            return dict(record["result"])
        console.print(f"[bold]→[/] {name}")
        began = time.monotonic()
        twin = self._done.get(this) if shared else None
        result = twin.again(outputs) if twin else dict(work())
        seconds = time.monotonic() - began
        write_json(
            self._record(name),
            {
                "stage": name,
                "inputs_hash": sha256_json(inputs),
                "inputs": inputs,
                "result": result,
                "seconds": seconds,
            },
        )
        self._attempt(name).unlink()
        self._done.setdefault(this, _Done(name, outputs, result))
        console.print(f"[green]✓[/] {name} [dim]({f'as {twin.name}' if twin else f'{seconds:.0f} s'})[/]")
        return result

    def begin(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: list[Path],
        *,
        keep_partial: bool = False,
        precious: Sequence[Path] = (),
    ) -> dict[str, Any] | None:
        """Return the record of a stage that is done; else clear its outputs and note that it was begun."""
        forced = self._is_forced(name)
        record = read_json(self._record(name)) if self._record(name).exists() else {}
        if not forced and self.matches(record, inputs) and all(path.exists() for path in outputs):
            return dict(record)
        begun = self.begun(name)
        if not (keep_partial and self.matches(begun, inputs)) or forced:
            if begun:
                self.refuse(name, precious, difference(begun, inputs))
            for path in outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._record(name).unlink(missing_ok=True)
        write_json(self._attempt(name), {"inputs_hash": sha256_json(inputs), "inputs": inputs})
        return None

    def begun(self, name: str) -> dict[str, Any]:
        """Return what is written of the last attempt at a stage, with its ``result`` if it is done; else nothing."""
        for path in (self._attempt(name), self._record(name)):
            if path.exists():
                return dict(read_json(path))
        return {}

    def matches(self, begun: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
        """Return whether a stage was begun with these inputs."""
        return bool(begun) and same_inputs(begun["inputs"], inputs)

    def refuse(self, name: str, precious: Sequence[Path], how: str) -> None:
        """Refuse to do a stage again if that removes what took long, unless it is forced.

        Args:
            name: The stage.
            precious: What must not be removed unasked.
            how: What it was made with, and is to be made with now.

        Raises:
            UserError: one of them is there.
        """
        costly = [path for path in precious if path.exists()]
        if costly and not self._is_forced(name):
            raise UserError(
                f"{costly[0]} was made with {how}; choose another --out, or --force {name} to remove it and begin "
                "again."
            )

    def _is_forced(self, name: str) -> bool:
        return any(name == stage or name.startswith(f"{stage}/") for stage in self._force)

    def _record(self, name: str) -> Path:
        return self.folder / "stages" / f"{name.replace('/', '-')}.json"

    def _attempt(self, name: str) -> Path:
        return self._record(name).with_suffix(".begun.json")


def difference(begun: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Return in words the first thing that differs between the inputs of an earlier attempt and those of now."""
    return _difference(begun.get("inputs", {}), json.loads(json.dumps(inputs)))


def _difference(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str:
    for key in (*now, *then):
        one, other = then.get(key), now.get(key)
        if one != other:
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                return _difference(one, other, f"{where}{key}.")
            short = all(len(str(value)) < 32 for value in (one, other))
            return f"{where}{key} {one}, not {other}" if short else f"another {where}{key}"
    return "other settings"
