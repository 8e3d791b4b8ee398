"""Submit to Slurm from anywhere, also from inside a job: what describes that job stays with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nemo_run as run

_OF_A_JOB = re.compile(
    r"(SLURM|SLURMD|SRUN|PMI|PMIX|TORCHELASTIC)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
"""What Slurm sets in an allocation, and srun, MPI and torchrun for each rank."""
_OF_THE_SITE = {"SLURM_CONF", "SLURM_ACCOUNT", "SLURM_PARTITION", "SLURM_TIMELIMIT"}
"""What Slurm itself never sets there, but sites and users do; launch profiles read the last three."""


@dataclass(kw_only=True)
class JobFreeTunnel(run.LocalTunnel):
    """NeMo-Run's commands on this machine, without the variables of the job that this process may be part of.

    ``sbatch`` hands its environment on to the job. There srun takes ``SLURM_CPU_BIND``, ``SLURM_MEM_PER_NODE`` and the
    like of an allocation that somebody submitted from for options: ranks would be bound to a few cores, or refused.
    """

    def run(self, command: str, hide: bool = True, warn: bool = False, **options: Any) -> Any:
        """Run a command in the clean environment; otherwise as ``LocalTunnel``."""
        return super().run(command, hide, warn, env=without_job(os.environ), replace_env=True, **options)


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what Slurm, srun and torchrun have set for a job; outside of one, as it is."""
    kept = {name: value for name, value in environment.items() if name != "PVS_HELD_LOCKS"}
    if not {"SLURM_JOB_ID", "SLURM_JOBID"} & kept.keys():
        return kept
    return {name: value for name, value in kept.items() if name in _OF_THE_SITE or not _OF_A_JOB.fullmatch(name)}
