from __future__ import annotations

import itertools

import torch

from nemo_pvs.pruning.search.timing import Timer, Workload, parts_of
from tests.benchmarks.latency import compare, model_config, shapes_of


class Scripted(Timer):
    """The n-th measurement of anything takes 1/n seconds."""

    def part(self, phase, part):
        return self._next()

    def whole(self, phase, shape):
        return self._next()

    def _next(self):
        self.measured = getattr(self, "measured", 0) + 1
        return 1 / self.measured


def test_models_and_parts_take_turns_and_the_shortest_time_counts():
    config = model_config(vocab=512, scale=16)
    shapes = shapes_of(config, scale=16)[:2]
    workload = Workload(config, "cpu", torch.float32, 1, 8)
    sums, models = compare(Scripted(workload), "decode", shapes, rounds=2)
    order = [what for _ in range(2) for shape in shapes for what in (shape, *(part for part, _ in parts_of(shape)))]
    last = {what: 1 / number for number, what in zip(itertools.count(1), order, strict=False)}
    assert models == [last[shape] for shape in shapes]
    assert sums == [sum(count * last[part] for part, count in parts_of(shape)) for shape in shapes]


def test_shapes_are_like_smollm2s_and_can_be_timed():
    assert shapes_of(model_config(vocab=49152, scale=1), scale=1)[-1].parameters == 134_515_008
    config = model_config(vocab=512, scale=16)
    shape = shapes_of(config, scale=16)[0].replace(layers=2)
    times = compare(Timer(Workload(config, "cpu", torch.float32, 1, 8)), "first token", [shape], rounds=1)
    assert all(seconds > 0 for (seconds,) in times)
