"""Run a function on several real ranks: processes forked from one server that has imported NeMo once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_pvs.system.processes import die_with_parent
from tests.conftest import Outcome

_PRELOAD = ["tests.megatron.preload"]
_SECONDS = 300


def fork_context() -> Any:
    """Return the context whose processes are forked from the server; forking pytest would inherit its threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``function(*arguments)`` returns on each rank; its environment is that of torchrun.

    A rank that fails, dies or hangs fails the test, with the end of its output.
    """
    context = fork_context()
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, rank, world_size, port, function, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        waiting = dict(zip(pipes, range(world_size), strict=True))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=_SECONDS)
            assert ready, f"ranks {sorted(waiting.values())} of {function.__name__} hang"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failure, results[rank] = pipe.recv()
                except EOFError:
                    failure = "died without a word"
                assert failure is None, f"rank {rank} of {function.__name__}: {failure}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _rank(sender: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID="tests",
    )
    try:
        sender.send((None, function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc()[-3000:], None))
    # Megatron's and gloo's threads need not be unwound.
    os._exit(0)


def pvs_on_ranks(world_size: int, *arguments: object) -> Outcome:
    """Run ``pvs`` on ranks in the environment of torchrun: the worst code, and what all of them print."""
    with tempfile.TemporaryDirectory() as folder:
        codes = run_ranks(world_size, _pvs, list(map(str, arguments)), Path(folder))
        said = ["".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{end}"))) for end in ("out", "err")]
    return Outcome(max(codes), *said)


def _pvs(arguments: list[str], folder: Path) -> int:
    from nemo_pvs.cli.main import main
    from nemo_pvs.system.progress import console

    console.quiet = os.environ["RANK"] != "0"  # as at its import, which was in the server, where there are no ranks
    rank = os.environ["RANK"]
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["pvs", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end_of_command:
        code = int(end_of_command.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def write_tokens(prefix: Path, tokens: list[int]) -> str:
    """Write one document of tokens as Megatron's .bin and .idx, and return the prefix."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
