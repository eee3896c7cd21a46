"""Start: what the package adds to a process that imports it, and to a command that prints help."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.data import Server
from benchmarks.results import Goal, Measured, Result, Side, Size

EMPTY: Final = "import typer\napp = typer.Typer()\napp.command()(lambda: None)\napp()"


def start(_: Server, size: Size) -> Measured:
    """Whole processes, in turn; the first round of many only warms the disk's cache."""
    command = str(Path(sys.executable).with_name("orphan-recovery"))
    return Measured(
        [
            _difference(
                "import orphan_recovery, beyond import sqlalchemy",
                ("import orphan_recovery", [sys.executable, "-c", "import orphan_recovery"]),
                ("import sqlalchemy", [sys.executable, "-c", "import sqlalchemy"]),
                Goal(150),
                size,
            ),
            _difference(
                "orphan-recovery --help, beyond an empty Typer program",
                ("orphan-recovery --help", [command, "--help"]),
                ("empty Typer program", [sys.executable, "-c", EMPTY, "--help"]),
                Goal(300),
                size,
            ),
        ]
    )


def _difference(
    name: str, ours: tuple[str, list[str]], other: tuple[str, list[str]], goal: Goal, size: Size
) -> Result:
    took: dict[str, list[float]] = {ours[0]: [], other[0]: []}
    warm = size.starts > 1
    for number in range(size.starts + warm):
        for side, command in (ours, other):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number or not warm:
                took[side].append((time.perf_counter() - began) * 1000)
    mine, theirs = took[ours[0]], took[other[0]]
    return Result(
        name,
        [one - median(theirs) for one in mine],
        goal,
        unit="ms",
        sides=[Side(side, values, "ms") for side, values in took.items()],
    )
