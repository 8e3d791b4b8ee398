"""``python -m tests.fuzz [SUBJECT ...] [--cases N] [--seed S]``: cases of every kind, or one of them again."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import Workshop
from tests.fuzz.subjects import SUBJECTS


def main() -> None:
    """Run the cases, print what was wrong, and exit with 1 if anything was."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"{', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, help="only the case with this number")
    given = parser.parse_args()
    subjects = given.subjects or list(SUBJECTS)
    seeds = range(given.cases // len(subjects)) if given.seed is None else [given.seed]
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for name in subjects:
            done = found = 0
            for seed in seeds:
                try:
                    done += workshop.run(name, SUBJECTS[name], seed)
                except AssertionError as fault:
                    found += 1
                    print(fault, flush=True)
            print(f"{name}: {len(seeds)} cases, {done} done, {found} at fault, the rest refused", flush=True)
            faults += found
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
