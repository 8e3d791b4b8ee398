"""Train a job by our recipe or by NeMo's in a separate process: ``python -m tests.gpu.step JOB NAME OUT``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from nemo_pvs.system.megatron_import import import_megatron
from nemo_pvs.training.job import TrainingJob

if __name__ == "__main__":
    alone = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "tests"}
    import_megatron()
    from tests.benchmarks.training_step import train

    job, name, out = sys.argv[1:]
    Path(out).write_text(json.dumps(asdict(train(TrainingJob.load(Path(job)), name))))
