"""Latency as a sum of measured parts: the arithmetic, the table's file, what is measured. No test looks at a clock."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.search import latency, timing
from nemo_pvs.pruning.search.latency import LatencyTable
from nemo_pvs.pruning.search.timing import InferencePhase, TimedPart, Timer, Workload, last_level_cache, parts_of
from tests.conftest import tiny_llama_config
from tests.families import CASES, tiny_config

SHAPE = Shape(layers=4, hidden=64, ffn=96, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=False)
NARROW = SHAPE.replace(hidden=32, layers=3)
FEW_HEADS = SHAPE.replace(heads=4, ffn=48)


def workload(context: int = 8, batch: int = 1, dtype: torch.dtype = torch.float32, **config: Any) -> Workload:
    return Workload(tiny_llama_config(**config).to_dict(), "cpu", dtype, batch, context)


class CountingTimer(Timer):
    """The n-th part that it measures takes n seconds; ``asked`` has them all."""

    def __init__(self, given: Workload, stop_after: int | None = None) -> None:
        super().__init__(given)
        self.asked: list[str] = []
        self._stop_after = stop_after

    def part(self, phase: InferencePhase, part: TimedPart) -> float:
        if len(self.asked) == self._stop_after:
            raise KeyboardInterrupt
        self.asked.append(f"{phase}: {part}")
        return float(len(self.asked))

    def whole(self, phase: InferencePhase, shape: Shape) -> float:
        self.asked.append(f"{phase}: whole")
        return 0.5


def write_table(path: Path, given: Workload, machine: str = "elsewhere", **content: Any) -> Path:
    path.write_text(json.dumps({"machine": {"device": machine}, "workload": given.describe(), **content}))
    return path


def test_a_shape_takes_its_parts_once_per_layer_and_the_head_once(tmp_path: Path) -> None:
    decode = {
        "attention hidden=64,heads=8,kv_groups=2": 1e-3,
        "attention hidden=64,heads=4,kv_groups=2": 0.75e-3,
        "mlp hidden=64,ffn=96": 2e-3,
        "mlp hidden=64,ffn=48": 1.5e-3,
        "head hidden=64,vocab=128": 16e-3,
    }
    first_token = {key: 10 * seconds for key, seconds in decode.items()}
    models = {"layers=4,hidden=64,ffn=96,kv_groups=2,heads=8,vocab=128": 25e-3}
    given = workload()
    path = write_table(tmp_path / "table.json", given, decode=decode, first_token=first_token, models=models)
    table = LatencyTable(Timer(given), path)
    assert table.seconds("decode", SHAPE) == pytest.approx(4 * (1e-3 + 2e-3) + 16e-3)
    assert table.seconds("decode", FEW_HEADS) == pytest.approx(4 * (0.75e-3 + 1.5e-3) + 16e-3)
    assert table.seconds("first token", SHAPE.replace(layers=1)) == pytest.approx(10 * 19e-3)
    assert table.latency(SHAPE) == pytest.approx((28e-3, 280e-3, 25e-3))
    assert table.latency(FEW_HEADS).whole is None
    shapes = [SHAPE, FEW_HEADS, SHAPE.replace(layers=3)]
    assert table.within(25e-3, shapes) == [FEW_HEADS, shapes[2]]
    assert table.within(28e-3, shapes) == shapes
    with pytest.raises(UserError) as refused:
        table.within(1e-3, shapes)
    assert str(refused.value) == (
        "None of the 3 shapes decodes a token in 1 ms; the fastest takes 25 ms: layers=4,hidden=64,ffn=48,kv_groups=2,"
        "heads=4,vocab=128. Give a larger --latency or allow more pruning (--max-width-pruning, --max-depth-pruning)."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"], "a complete table takes no lock"


def test_every_part_of_the_shapes_is_measured_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    timer = CountingTimer(workload())
    seen: list[tuple[int, int, str]] = []
    table = LatencyTable(timer, path)
    table.measure("decode", [SHAPE, FEW_HEADS, SHAPE.replace(layers=2)], lambda *told: seen.append(told))
    parts = {str(part) for shape in (SHAPE, FEW_HEADS) for part, _ in parts_of(shape)}
    assert Counter(timer.asked) == Counter(f"decode: {part}" for part in parts)
    assert [(done, total) for done, total, _ in seen] == [(place, 5) for place in range(5)]
    assert [f"decode: {what}" for *_, what in seen] == timer.asked
    table.measure("first token", [SHAPE])
    table.measure_whole([SHAPE])
    assert timer.asked[5:] == [
        *(f"first token: {part}" for part in sorted(str(part) for part, _ in parts_of(SHAPE))),
        ("decode: whole"),
    ]

    again = CountingTimer(workload())
    known = LatencyTable(again, path)
    known.measure("decode", [FEW_HEADS, SHAPE])
    known.measure("first token", [SHAPE])
    known.measure_whole([SHAPE])
    assert known.latency(SHAPE) == table.latency(SHAPE)
    known.measure("decode", [NARROW])
    assert sorted(again.asked) == sorted(f"decode: {part}" for part, _ in parts_of(NARROW))
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    interrupted = CountingTimer(workload(), stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        LatencyTable(interrupted, path).measure("decode", [SHAPE, NARROW])
    resumed = CountingTimer(workload())
    LatencyTable(resumed, path).measure("decode", [SHAPE, NARROW])
    assert len(interrupted.asked) == 3 == len(resumed.asked)
    assert not {*interrupted.asked} & {*resumed.asked}


def test_by_default_it_is_in_the_cache_by_machine_and_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = workload()
    table = LatencyTable(CountingTimer(given))
    assert table.path.parent == tmp_path / "nemo_pvs" / "latency"
    table.measure("decode", [SHAPE])
    written = json.loads(table.path.read_text())
    assert written["machine"] == given.machine
    assert written["machine"].keys() == {"device", "threads", "torch", "transformers"}
    assert written["workload"] == {
        "architecture": "LlamaForCausalLM",
        "head_dim": 16,
        "features": [],
        "on": "cpu",
        "dtype": "float32",
        "batch": 1,
        "context": 8,
    }
    others = [workload(9), workload(8, 2), workload(dtype=torch.bfloat16), workload(attention_bias=True)]
    assert len({LatencyTable(CountingTimer(other)).path for other in (given, *others)}) == 5
    wider = workload(num_hidden_layers=2, hidden_size=32, vocab_size=64)
    assert LatencyTable(CountingTimer(wider)).path == table.path, "its parts are in the same table"
    monkeypatch.setattr(timing, "_processor", lambda: "another")
    assert LatencyTable(CountingTimer(given)).path != table.path


def test_the_table_of_another_machine_is_read_and_never_added_to(tmp_path: Path) -> None:
    given = workload()
    known = {str(part): 1.0 for part, _ in parts_of(SHAPE)}
    path = write_table(tmp_path / "table.json", given, decode=known)
    before = path.read_bytes()
    timer = CountingTimer(given)
    table = LatencyTable(timer, path)
    assert not table.can_grow
    assert table.within(10, [SHAPE]) == [SHAPE]
    assert table.latency(SHAPE) == (9.0, None, None)
    with pytest.raises(
        UserError, match=r"another machine \(elsewhere\) and lacks 2 times, .* run the same search the"
    ):
        table.measure("decode", [SHAPE, FEW_HEADS])
    assert (timer.asked, path.read_bytes()) == ([], before)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = workload(context=8)
    path = write_table(tmp_path / "table.json", given)
    with pytest.raises(
        UserError, match=r"table.json was measured with batch 1 instead of 2, context 8 instead of 9; giv"
    ):
        LatencyTable(Timer(workload(context=9, batch=2)), path)
    for damage in ({"decode": {"x": -1.0}}, {"decode": {"x": float("nan")}}, {"decode": {"x": "fast"}}, {"extra": 1}):
        write_table(path, given, **damage)
        with pytest.raises(UserError, match="is not a table of latencies"):
            LatencyTable(Timer(given), path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        LatencyTable(Timer(given), path)


def test_ranks_do_not_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = LatencyTable(CountingTimer(workload()), tmp_path / "table.json")
    assert table.can_grow
    monkeypatch.setattr(latency.ranks, "world_size", lambda: 2)
    assert not table.can_grow
    with pytest.raises(UserError, match="measured by one process; run the same command without torchrun first"):
        table.measure("decode", [SHAPE])


def test_contexts_that_the_model_does_not_support_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"after 256 tokens .* max_position_embeddings is 256; choose a smaller --context"
    ):
        workload(context=256)
    workload(context=255)
    window = tiny_config("mistral", sliding_window=8).to_dict()
    with pytest.raises(UserError, match=r"after 8 tokens .* sliding_window is 8"):
        Workload(window, "cpu", torch.float32, batch=1, context=8)
    for batch, context in ((0, 8), (1, 0)):
        with pytest.raises(UserError, match="needs a batch and a context of 1 or more"):
            workload(context, batch)


def test_copies_that_do_not_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.host_memory, "available", lambda: 1 << 20)
    with pytest.raises(
        UserError, match=r"Measuring attention hidden=64.* needs [\d.]+ GB, more than is free here; ch"
    ):
        Timer(workload(context=200)).part("decode", TimedPart("attention", 64, heads=8, kv_groups=2))
    assert not Timer(workload()).holds(SHAPE.replace(vocab=100_000))
    assert Timer(workload()).holds(SHAPE)


def test_the_cache_that_copies_have_to_exceed(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert last_level_cache(cpu, tmp_path) == 64 << 20
    for index, size in enumerate(("32K", "1024K", "16M")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert last_level_cache(cpu, tmp_path) == 16 << 20


class Operations(TorchDispatchMode):
    """Counts what PyTorch computes, by operator and sizes, and how many bytes of weights its products read."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()
        self.weights: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not function.is_view:
            tensors = [one for one in torch.utils._pytree.tree_leaves(arguments) if isinstance(one, torch.Tensor)]
            self.counts[(str(function), *(tuple(one.shape) for one in tensors))] += 1
            if "mm" in str(function):
                weight = tensors[-1].untyped_storage()
                self.weights[weight.data_ptr()] = weight.nbytes()
        return function(*arguments, **(options or {}))


class RecordingTimer(Timer):
    """Runs once what would be timed, and records it."""

    def _median_seconds(self, run: Callable[[], None]) -> float:
        with Operations() as self.done:
            run()
        return 1.0


@pytest.mark.parametrize("phase", ["decode", "first token"])
@pytest.mark.parametrize(("family", "about", "settings"), CASES, ids=lambda one: one if isinstance(one, str) else "")
def test_parts_do_together_what_the_whole_model_does(
    family: str, about: str, settings: dict[str, Any], phase: InferencePhase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operator by operator, with the sizes of its inputs."""
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1)  # one copy each
    timer = RecordingTimer(Workload(tiny_config(family, **settings).to_dict(), "cpu", torch.float32, 2, 6))
    parent = Layout.for_config(timer.workload.config).shape(timer.workload.config)
    shape = parent.replace(layers=2, hidden=32, ffn=48, kv_groups=parent.kv_groups // 2)
    timer.whole(phase, shape)
    whole, parts = timer.done.counts, Counter[Any]()
    for part, count in parts_of(shape):
        timer.part(phase, part)
        parts.update({operation: count * times for operation, times in timer.done.counts.items()})
    assert parts == whole
    keys = {name: sizes for name, *sizes in whole if "scaled_dot_product" in name}
    tokens = 1 if phase == "decode" else 6
    assert [sizes[0][2:] for sizes in keys.values()] == [(tokens, 16)]
    assert [sizes[1][2:] for sizes in keys.values()] == [(7 if phase == "decode" else 6, 16)]


@pytest.mark.parametrize("part", [part for part, _ in parts_of(SHAPE)], ids=lambda part: part.kind)
def test_a_part_reads_several_times_what_the_cache_holds(part: TimedPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 50_000)
    timer = RecordingTimer(workload())
    seconds = timer.part("decode", part)
    cached = 2 * 8 * 2 * 16 * 4  # keys and values of a layer
    copies = round(1 / seconds)
    read = sum(timer.done.weights.values()) + (copies * cached if part.kind == "attention" else 0)
    assert read - read / copies < 4 * 50_000 <= read, "as few copies as possible"
