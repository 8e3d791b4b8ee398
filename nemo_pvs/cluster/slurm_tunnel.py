"""Submit to Slurm from anywhere, even inside a job: variables that describe this job are not passed on."""

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
"""Variables that Slurm sets in an allocation, and srun, MPI and torchrun for each rank."""
_OF_THE_SITE = {"SLURM_CONF", "SLURM_ACCOUNT", "SLURM_PARTITION", "SLURM_TIMELIMIT"}
"""Variables that Slurm itself never sets, but sites and users do; launch profiles read the last three."""


@dataclass(kw_only=True)
class JobFreeTunnel(run.LocalTunnel):
    """Runs NeMo-Run's commands on this machine, without the variables of the job that this process may be part of.

    ``sbatch`` passes its environment on to the job, where srun treats variables such as ``SLURM_CPU_BIND`` and
    ``SLURM_MEM_PER_NODE`` as options. If they came from the allocation in which sbatch was called, ranks would be
    bound to a few cores, or refused.
    """

    def run(self, command: str, hide: bool = True, warn: bool = False, **options: Any) -> Any:
        """Run a command as ``LocalTunnel`` does, but in the clean environment."""
        return super().run(command, hide, warn, env=without_job(os.environ), replace_env=True, **options)


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of a Slurm job, and without ``PVS_HELD_LOCKS``."""
    kept = {name: value for name, value in environment.items() if name != "PVS_HELD_LOCKS"}
    if not {"SLURM_JOB_ID", "SLURM_JOBID"} & kept.keys():
        return kept
    return {name: value for name, value in kept.items() if name in _OF_THE_SITE or not _OF_A_JOB.fullmatch(name)}
