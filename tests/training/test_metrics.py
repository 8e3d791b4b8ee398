import json
import os

from nemo_pvs.training import metrics


def test_resumed_steps_replace_earlier_ones_and_half_a_line_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.5), (2, 4.25), (3, 3.75)]:
        metrics.append(path, {"kind": "training", "step": step, "loss": loss})
    metrics.append(path, {"kind": "validation", "step": 2, "loss": 4.5})
    with open(path, "a") as file:
        file.write(json.dumps({"kind": "training", "step": 4, "loss": 1.0})[:20])
    curve = metrics.read(path)
    assert [(point["step"], point["loss"]) for point in curve.training] == [(1, 5.0), (2, 4.25), (3, 3.75)]
    assert [(point["step"], point["loss"]) for point in curve.validation] == [(2, 4.5)]


def test_a_file_that_grows_is_read_on_from_where_it_ended(tmp_path):
    """Never twice, and not beyond the last whole line; steps that a resumed run is about to repeat are gone."""
    path = tmp_path / "metrics.jsonl"
    growing = metrics.GrowingMetrics(path)
    assert growing.read() == metrics.Metrics([], [])
    for step in (1, 2, 3):
        metrics.append(path, {"kind": "training", "step": step})
        with open(path, "a") as file:
            half = json.dumps({"kind": "training", "step": step + 1})
            file.write(half[:9])
        assert [point["step"] for point in growing.read().training] == list(range(1, step + 1))
        os.truncate(path, path.stat().st_size - 9)
    metrics.append(path, {"kind": "training", "step": 2})
    assert [point["step"] for point in growing.read().training] == [1, 2]
    path.unlink()
    metrics.append(path, {"kind": "training", "step": 1})
    assert growing.read().training == metrics.read(path).training == [{"step": 1}]


def test_the_record_after_half_a_line_is_not_lost_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"kind": "training", "step": 1, "loss": 5.0})
    with open(path, "a") as file:
        file.write('{"kind": "training", "st')  # a full disk
    for step in (2, 3):
        metrics.append(path, {"kind": "training", "step": step, "loss": 4.0})
    assert [point["step"] for point in metrics.read(path).training] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 4


def test_parts_of_a_training_are_counted_through(tmp_path):
    for part, losses in enumerate([(5.0, 4.0), (4.5, 3.5)]):
        for step, loss in enumerate(losses, 1):
            metrics.append(tmp_path / str(part), {"kind": "training", "step": step, "tokens": 8 * step, "loss": loss})
        metrics.append(tmp_path / str(part), {"kind": "validation", "step": 2, "tokens": 16, "loss": loss})
        metrics.append(tmp_path / str(part), {"kind": "sparsity", "step": 2, "zero_fraction": 0.5})
    curve = metrics.join_curves([(tmp_path / "0", 0), (tmp_path / "1", 2)], tokens_per_step=8)
    points = [tuple(point.values()) for point in curve.training]
    assert points == [(1, 8, 5.0), (2, 16, 4.0), (3, 24, 4.5), (4, 32, 3.5)]
    assert [tuple(point.values()) for point in curve.validation] == [(2, 16, 4.0), (4, 32, 3.5)]
    assert [point["step"] for point in curve.sparsity] == [2, 4]


def test_no_file_is_an_empty_curve(tmp_path):
    assert metrics.read(tmp_path / "none") == metrics.Metrics([], [])
