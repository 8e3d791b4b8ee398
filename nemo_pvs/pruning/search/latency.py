"""Latency of a shape as the sum of its measured parts, from a table that is filled as parts are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.search.timing import InferencePhase, TimedPart, Timer, parts_of
from nemo_pvs.system import ranks
from nemo_pvs.system.files import cache_folder, read_json, sha256_json, write_json
from nemo_pvs.system.folder_lock import locked_target

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LatencyProgress = Callable[[int, int, str], None]
"""Called with (measured, in all, what is being measured)."""

_SIZES = ("layers", "hidden", "ffn", "kv_groups", "heads", "vocab")


class Latency(NamedTuple):
    """Seconds that a model takes, for all sequences of a batch together."""

    per_token: float
    """To decode one token of each sequence after ``context`` others: the sum of the model's parts."""
    first_token: float | None
    """From ``context`` tokens to the next one: the sum of the model's parts; None where the table lacks them."""
    whole: float | None = None
    """``per_token`` measured on the whole model; None where it was not."""


class _Content(BaseModel):
    """A table's file, with seconds by part or model."""

    model_config = ConfigDict(extra="forbid")

    machine: dict[str, Any]
    workload: dict[str, Any]
    decode: dict[str, Seconds] = {}
    first_token: dict[str, Seconds] = {}
    models: dict[str, Seconds] = {}

    def times(self, kind: InferencePhase | Literal["models"]) -> dict[str, float]:
        """Return the seconds of parts in a phase, or of whole models that decode a token."""
        return {"decode": self.decode, "first token": self.first_token, "models": self.models}[kind]


class LatencyTable:
    """Measured parts of models, kept in a JSON file that every measurement is saved to at once.

    A table of another machine is read but never added to.
    """

    def __init__(self, timer: Timer, path: Path | None = None) -> None:
        """Read the table.

        Args:
            timer: Measures what the table lacks.
            path: Its file; by default one for this machine and workload in the user's cache.

        Raises:
            UserError: the file is not a table, or one of another workload, such as another context.
        """
        self._timer = timer
        self._machine = timer.workload.machine
        self._workload = timer.workload.describe()
        name = sha256_json([self._machine, self._workload])[:32]
        self.path = path or cache_folder() / "latency" / f"{name}.json"
        self._content = self._read()

    def within(self, bound: float, shapes: Sequence[Shape], progress: LatencyProgress | None = None) -> list[Shape]:
        """Return the shapes that decode a token in at most ``bound`` seconds; measure their parts where unknown.

        Raises:
            UserError: no shape does, or parts cannot be measured.
        """
        self.measure("decode", shapes, progress)
        fast = [shape for shape in shapes if self.seconds("decode", shape) <= bound]
        if not fast:
            best = min(shapes, key=lambda shape: self.seconds("decode", shape))
            raise UserError(
                f"None of the {len(shapes)} shapes decodes a token in {bound * 1e3:.4g} ms; the fastest takes "
                f"{self.seconds('decode', best) * 1e3:.4g} ms: {_key(best)}. Give a larger --latency or allow more "
                "pruning (--max-width-pruning, --max-depth-pruning)."
            )
        return fast

    def measure(self, phase: InferencePhase, shapes: Iterable[Shape], progress: LatencyProgress | None = None) -> None:
        """Measure the parts of shapes that the table lacks.

        Raises:
            UserError: the table is of another machine, is being measured by another command, or there are several
                ranks, which would slow each other down.
        """
        parts: dict[str, TimedPart] = {str(part): part for shape in shapes for part, _ in parts_of(shape)}
        self._complete(
            phase,
            {key: partial(self._timer.part, phase, part) for key, part in sorted(parts.items())},
            progress,
        )

    def measure_whole(self, shapes: Iterable[Shape], progress: LatencyProgress | None = None) -> None:
        """Time decoding with whole models, to check the sums of their parts; those too large for memory are left out.

        Raises:
            UserError: as for ``measure``.
        """
        models = {_key(shape): shape for shape in shapes if self._timer.holds(shape)}
        self._complete(
            "models",
            {key: partial(self._timer.whole, "decode", shape) for key, shape in models.items()},
            progress,
        )

    def seconds(self, phase: InferencePhase, shape: Shape) -> float:
        """Return the sum of a shape's parts, which have been measured."""
        times = self._content.times(phase)
        return sum(count * times[str(part)] for part, count in parts_of(shape))

    def latency(self, shape: Shape) -> Latency:
        """Return what is known about a shape whose parts have been measured for decoding."""
        known = self._content.first_token
        first_token = None
        if all(str(part) in known for part, _ in parts_of(shape)):
            first_token = self.seconds("first token", shape)
        return Latency(self.seconds("decode", shape), first_token, self._content.models.get(_key(shape)))

    @property
    def can_grow(self) -> bool:
        """Whether what it lacks can be measured: it is of this machine, which no other rank is using."""
        return self._content.machine == self._machine and ranks.world_size() == 1

    def _complete(
        self,
        kind: InferencePhase | Literal["models"],
        measurements: Mapping[str, Callable[[], float]],
        progress: LatencyProgress | None,
    ) -> None:
        """Measure what is not known, and save each result."""
        missing = measurements.keys() - self._content.times(kind).keys()
        if not missing:
            return
        if self._content.machine != self._machine:
            raise UserError(
                f"{self.path} was measured on another machine ({self._content.machine.get('device')}) and lacks "
                f"{len(missing)} times, such as that of {min(missing)}; run the same search there first, or give "
                "another --latency-table."
            )
        if ranks.world_size() > 1:
            raise UserError(
                "Latency is measured by one process; run the same command without torchrun first, with "
                "--latency-table FILE, and give that file here."
            )
        with locked_target(self.path):
            self._content = self._read()  # another command may have added to it
            todo = [key for key in measurements if key not in self._content.times(kind)]
            for place, key in enumerate(todo):
                if progress:
                    progress(place, len(todo), key)
                self._content.times(kind)[key] = measurements[key]()
                write_json(self.path, self._content.model_dump())

    def _read(self) -> _Content:
        found = ranks.from_main(lambda: read_json(self.path) if self.path.exists() else None)
        if found is None:
            return _Content(machine=self._machine, workload=self._workload)
        try:
            content = _Content.model_validate(found)
        except ValidationError:
            raise UserError(
                f"{self.path} is not a table of latencies; remove it or give another --latency-table."
            ) from None
        if content.workload != self._workload:
            differences = (
                f"{name} {content.workload.get(name)} instead of {value}"
                for name, value in self._workload.items()
                if content.workload.get(name) != value
            )
            raise UserError(f"{self.path} was measured with {', '.join(differences)}; give another --latency-table.")
        return content


def _key(shape: Shape) -> str:
    return ",".join(f"{name}={getattr(shape, name)}" for name in _SIZES)
