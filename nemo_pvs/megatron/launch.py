"""Start the ranks of training jobs: forked on a CPU, by torchrun on GPUs; or run as a rank that was started already.

Run it as ``python -m nemo_pvs.megatron.launch JOB...``; with ``--slurm`` before the jobs in each srun task; with
``--locked`` if the process that starts it has locked the jobs' folders; or with ``-`` to read paths of job files from
standard input, one per line, and answer each with its exit code. SIGTERM and SIGUSR1 are forwarded to the ranks, which
save and exit with ``PREEMPTED``. Importing this module is cheap: NeMo is imported only to train.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType

from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.gpu_environment import set_gpu_environment
from nemo_pvs.system.megatron_import import import_megatron
from nemo_pvs.system.processes import die_with_parent, forked_die_with_this
from nemo_pvs.system.rendezvous import STANDALONE, rank_environment
from nemo_pvs.training.preemption import PREEMPTED, USER_ERROR_FILE, children, handing_on, send_to_each
from nemo_pvs.training.teaching_job import Job, load_job


def main(arguments: list[str]) -> int:
    """Train the jobs in order until one fails; return its exit code, or 0."""
    set_gpu_environment()
    if arguments == ["-"]:
        return _serve()
    try:
        if arguments[:1] == ["--slurm"]:
            arguments = arguments[1:]
            _take_rank_from_slurm()
        locked = arguments[:1] == ["--locked"]
        jobs = [load_job(Path(argument)) for argument in arguments[locked:]]
        return next((code for job in jobs if (code := _run(job, locked))), 0)
    except UserError as error:
        print(f"pvs: {error}", file=sys.stderr, flush=True)
        if USER_ERROR_FILE in os.environ:
            with suppress(OSError):  # what the user has to fix may be a full disk
                Path(os.environ[USER_ERROR_FILE]).touch()
        return 2


def _run(job: Job, locked: bool) -> int:
    """Run one rank of a job, or start all of them; a single process holds the lock of the job's folder.

    Args:
        job: The job.
        locked: Whether the process that started this one holds it.
    """
    found = rank_environment()
    # Pyxis sets RANK and WORLD_SIZE=1 in a single task; what starts ranks for us also sets the id.
    alone = os.environ.get("WORLD_SIZE") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ
    if alone or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        with locked_folder(job.folder):
            return _start(job)
    size, needed = found.size if found else 1, job.layout.processes
    if size != needed:
        raise UserError(f"{job.name} needs {needed} ranks, but the variable WORLD_SIZE is {size}; start {needed}.")
    if not locked and os.environ.get("LOCAL_RANK") == "0":  # nobody else has written it
        print(*_doctors_lines(), sep="\n", flush=True)
    _check_gpus_of_ranks()
    if locked:  # by the launcher, under whose torchrun this is
        die_with_parent()
    forked_die_with_this()
    with locked_folder(job.folder) if os.environ["RANK"] == "0" and not locked else nullcontext():
        _training().train(job)
    return 0


def _take_rank_from_slurm() -> None:
    """Set torchrun's environment variables from srun's; MASTER_ADDR comes from the batch script.

    Raises:
        UserError: srun did not start this process, or nodes have different numbers of tasks.
    """
    of_slurm = {
        "RANK": "SLURM_PROCID",
        "LOCAL_RANK": "SLURM_LOCALID",
        "GROUP_RANK": "SLURM_NODEID",
        "WORLD_SIZE": "SLURM_NTASKS",
        "TORCHELASTIC_RUN_ID": "SLURM_JOB_ID",  # tells Lightning that the processes exist already
    }
    missing = [variable for variable in of_slurm.values() if variable not in os.environ]
    if missing:
        raise UserError(f"--slurm is for a task that srun starts, but {missing[0]} is not set; leave --slurm out.")
    os.environ.update({name: os.environ[variable] for name, variable in of_slurm.items()})
    os.environ["LOCAL_WORLD_SIZE"] = str(_tasks_of_each_node())
    os.environ.setdefault("MASTER_PORT", "29500")


def _tasks_of_each_node() -> int:
    """Return the number of this step's tasks on each node.

    Slurm writes 8(x4) for four nodes of eight. SLURM_NTASKS_PER_NODE is set only if --ntasks-per-node was given.

    Raises:
        UserError: nodes have different numbers of tasks.
    """
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    numbers = {re.sub(r"\(x\d+\)", "", entry) for entry in counts.split(",")}
    if len(numbers) != 1 or not (only := numbers.pop()).isdecimal():
        raise UserError(
            f"Slurm's tasks per node are {counts or 'not set'}, but every node must have the same number of ranks; "
            "give srun --ntasks-per-node with the GPUs of a node."
        )
    return int(only)


def _check_gpus_of_ranks() -> None:
    """Refuse more ranks on this node than GPUs that each of them sees; without GPUs ranks share the CPU.

    Raises:
        UserError: there are more.
    """
    import torch

    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < ranks:
        raise UserError(
            f"This node has {ranks} ranks, but each sees {gpus} of its GPUs; start one rank per GPU (gpus_per_node of "
            "the --launch profile) and let every rank see all GPUs of its node (srun without --gpus-per-task)."
        )


def _serve() -> int:
    """Train the jobs that standard input names; libraries' output goes to standard error, apart from the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        print(_start(load_job(Path(line.strip()))), file=answers)
    return 0


def _start(job: Job) -> int:
    """Start all ranks of a job on this machine.

    Raises:
        UserError: it has fewer GPUs than the job has ranks.
    """
    import torch

    with open(job.log, "a") as log:
        print(*_doctors_lines(), sep="\n", file=log)
    if not torch.cuda.is_available():
        return _fork_ranks(job)
    from nemo_pvs.training.machine import check_gpus

    check_gpus(job.name, job.layout, torch.cuda.device_count())
    return _torchrun(job)


def _doctors_lines() -> list[str]:
    """Return the lines with which the log of a training begins: where it runs, on what, and what is wrong there."""
    from nemo_pvs.doctor.examine import log_lines

    return log_lines()


def _training() -> ModuleType:
    """Import NeMo, and return the module that trains with it.

    The garbage collector would traverse all of NeMo repeatedly during the import, and once more in each rank.
    """
    gc.disable()
    import_megatron()
    from nemo_pvs.megatron import rank

    gc.freeze()
    gc.enable()
    return rank


def _torchrun(job: Job) -> int:
    """Run the job's ranks under torchrun, with their output in the job's log."""
    command = [sys.executable, "-m", "torch.distributed.run", *STANDALONE, "--nproc-per-node"]
    command += [str(job.layout.processes), "-m", "nemo_pvs.megatron.launch", "--locked", str(job.save())]
    with (
        open(job.log, "a") as log,
        # It ends with this process, and its ranks with it: otherwise they would go on without a lock.
        subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent) as agent,
        # Not to the agent itself: it would give the ranks 30 seconds and then kill them.
        handing_on(lambda number: send_to_each(children(agent.pid), number)) as came,
    ):
        code = agent.wait()
    return PREEMPTED if code and came else code


def _fork_ranks(job: Job) -> int:
    """Fork the job's ranks from this process, so that NeMo is imported once for all jobs and ranks."""
    train_on_cpu = _training().train_on_cpu
    context = multiprocessing.get_context("fork")
    ranks: list[multiprocessing.Process] = []
    try:
        with _reserved_port() as port:
            for rank in range(job.layout.processes):
                ranks.append(context.Process(target=_rank, args=(train_on_cpu, job, rank, port)))
                ranks[-1].start()
            pids = [process.pid for process in ranks if process.pid]
            with handing_on(lambda number: send_to_each(pids, number)) as came:
                code = _wait(ranks)
        return PREEMPTED if code and came else code
    finally:
        # A rank that waits for a dead partner ignores SIGTERM inside a collective.
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _wait(ranks: list[multiprocessing.Process]) -> int:
    """Wait until one rank fails, and return its exit code, or until all have ended, and return 0."""
    waiting = {process.sentinel: process for process in ranks}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            process = waiting.pop(sentinel)
            process.join()
            if process.exitcode:
                return process.exitcode
    return 0


def _rank(target, job: Job, rank: int, port: int) -> None:
    """Run one rank: with torchrun's environment variables, output to the job's log, killed when the launcher dies."""
    die_with_parent()
    forked_die_with_this()
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(job.layout.processes),
        LOCAL_WORLD_SIZE=str(job.layout.processes),
        TORCHELASTIC_RUN_ID="nemo_pvs",  # tells Lightning that the processes exist already
    )
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    target(job)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Yield a port that no other process is given while the block runs, so that two jobs never share one.

    A socket that is bound but does not listen keeps the port; rank 0 can still listen on it, as both reuse addresses.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        yield int(server.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
