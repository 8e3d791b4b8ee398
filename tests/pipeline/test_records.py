"""What a stage returned is the same after it was written and read again, and is written as it always was."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_pvs.pipeline.records import (
    DataRecord,
    EvaluationRecord,
    MasksRecord,
    ParentRecord,
    PrunedRecord,
    RandomRecord,
    Record,
    Records,
    ScoresRecord,
    TasksRecord,
    TrainedRecord,
)
from nemo_pvs.system.files import json_text

CHARGE = {
    "activity": "calibration",
    "tokens": 768,
    "flops": 1288372224,
    "note": "while pruning, layer by layer",
    "flops_zeros_skipped": None,
    "tokens_per_step": None,
    "read": None,
}
FILE = {"tokens": 7, "bin_sha256": "c"}
TRAIN = {"tokens": 14, "bin_sha256": "d", "files": [FILE, FILE]}
MEASURED = {"loss": 2.0, "loss_stderr": None, "tokens": 256, "perplexity": 7.4, "perplexity_stderr": None}
RESULTS: list[tuple[type[Record], dict[str, Any]]] = [
    (ParentRecord, {"path": "parent", "fingerprint": "a"}),
    (DataRecord, {"splits": {"train": TRAIN, "test": {"documents": 6, **FILE}}, "validation_windows": {"samples": 8}}),
    (ScoresRecord, {"scores": "b", "tokens": 256}),
    (MasksRecord, {"checkpoint": "step=1-last", "masks": "e"}),
    (PrunedRecord, {"fingerprint": "a"}),
    (PrunedRecord, {"fingerprint": "a", "plan": "b"}),
    (PrunedRecord, {"fingerprint": "a", "plan": "b", "search": {"tokens": 9, "flops": 8, "losses": [1.5, 2.0]}}),
    (PrunedRecord, {"fingerprint": "a", "plan": "b", "search": {"tokens": 9, "flops": 8, "scores": [0.5]}}),
    (PrunedRecord, {"fingerprint": "a", "plan": "b", "calibration": {"tokens": 9, "flops": 8}, "charges": [CHARGE]}),
    (PrunedRecord, {"fingerprint": "a", "charges": []}),
    (RandomRecord, {"fingerprint": "a"}),
    (TrainedRecord, {"fingerprint": "a", "layout": {"tensor_parallel": 2}}),
    (TrainedRecord, {"fingerprint": "a"}),
    (EvaluationRecord, {"test": MEASURED, "validation": MEASURED}),
    (EvaluationRecord, {"test": MEASURED}),
    (TasksRecord, {}),
]
"""Results as they are written, key by key."""


@pytest.mark.parametrize(("kind", "result"), RESULTS)
def test_a_record_is_written_as_it_was_read(kind: type[Record], result: dict[str, Any]) -> None:
    record = kind.from_json(result)
    assert json_text(record.to_json()) == json_text(result)
    assert kind.from_json(record.to_json()) == record


def test_records_are_found_by_what_they_are_about() -> None:
    records = Records()
    last, first = PrunedRecord("last"), PrunedRecord("first")
    records["prune/a/stage-1"], records["prune/a"], records["random/a"] = first, last, RandomRecord("r")
    assert (records.pruned("a"), records.pruned("a", 1), records.random("a").fingerprint) == (last, first, "r")
    assert list(records.of(PrunedRecord)) == ["prune/a/stage-1", "prune/a"]
    assert "prune/b" not in records
