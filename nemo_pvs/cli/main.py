"""The command ``pvs``: verbs as commands, mistakes as one sentence."""

from __future__ import annotations

import errno
import io
import os
import sys

import typer

import nemo_pvs
from nemo_pvs.cli.scaling import scaling_fit, scaling_predict
from nemo_pvs.cli.verbs import VERBS
from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.system.files import expand_home
from nemo_pvs.system.gpu_environment import set_gpu_environment
from nemo_pvs.system.processes import heeding_interrupts
from nemo_pvs.system.progress import console

_INTERRUPTED = 130

app = typer.Typer(
    name="pvs",
    help="Prune a Llama-family model, keep training it on Megatron, and compare it with training from scratch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)

scaling = typer.Typer(no_args_is_help=True, help="The same as scaling-fit and scaling-predict.")
scaling.command("fit")(scaling_fit)
scaling.command("predict")(scaling_predict)
app.add_typer(scaling, name="scaling")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="print the version and exit")) -> None:
    if version:
        console.print(nemo_pvs.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; exit with 2 for a mistake that the user can fix, 1 for a run that failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the locale lacks ±, hours of work do not end in a traceback
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    set_gpu_environment()  # for this process and for the ranks that it starts
    # A streamed tensor is fresh memory; in huge pages it costs a third of the time (tests/benchmarks/README.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with heeding_interrupts():
            app([expand_home(word) for word in sys.argv[1:]])
    except UserError as error:
        _complain(error)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # no name of ours is too long
            raise
        _complain(f"{error.filename} cannot be read: its name is too long; check the path.")
        sys.exit(2)
    except TrainingError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            _complain("interrupted; run the same command again to continue.")
        raise


def _complain(message: object) -> None:
    print(f"pvs: {message}", file=sys.stderr)
