"""Measure the product against its goals, and against its peers: one command, one table.

    python -m benchmarks [--quick] [--only NAME …] [--rounds N] [--json FILE] [--docs FOLDER]

On BENCH_DATABASE_URL (a server where databases may be created), or an embedded one. Every figure
is of two sides measured in turn, in one run: what is judged is their ratio, not the machine.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks import detection, flow, interference, peers, plots, rates, scale, start
from benchmarks.data import Server, server
from benchmarks.results import FULL, QUICK, Measured, Size, as_table

SUBJECTS: Final[dict[str, Callable[[Server, Size], Measured]]] = {
    "rates": rates.rates,
    "beaten": rates.beaten,
    "four": rates.four,
    "interference": interference.interference,
    "peers": peers.peers,
    "scaling": rates.scaling,
    "idle": detection.idle,
    "detection": detection.detection,
    "flow": flow.flow,
    "start": start.start,
    "in-flight": scale.in_flight,
    "targets": scale.targets,
}
ONLY_NAMED: Final = ("in-flight", "targets")
"""They take many minutes and gigabytes, so they are no part of the whole."""
PACKAGES: Final = ("prefect", "sqlalchemy", "psycopg", "procrastinate", "pgqueuer")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small numbers; judges nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SUBJECTS,
        default=[name for name in SUBJECTS if name not in ONLY_NAMED],
        help=f"some of it; {' and '.join(ONLY_NAMED)} take long, and run only when named here",
    )
    parser.add_argument("--rounds", type=int, help="of each side")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--docs", type=Path, help="draw the plots into that folder")
    asked = parser.parse_args()
    for folder in (asked.docs, asked.json and asked.json.parent):  # not to fail for it at the end
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    # Byte code is kept, as it is wherever the product runs; else every process compiles anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    size = QUICK if asked.quick else FULL
    if asked.rounds:
        rounds = dict.fromkeys(("rounds", "flow_rounds", "load_rounds"), asked.rounds)
        size = replace(size, **rounds)
    console = Console(width=None if Console().is_terminal else 140)
    measured = Measured()
    with server() as ready:
        console.print(*(f"{name} {value}" for name, value in ready.settings().items()), sep=", ")
        for name in asked.only:
            began = datetime.now(UTC)
            console.print(f"{began:%H:%M:%S} {name} ...")
            found = SUBJECTS[name](ready, size)
            for result in found.results:
                shown = replace(result, is_judged=not asked.quick)
                console.print(f"         {shown}", highlight=False)
                measured.results.append(shown)
            measured.series |= found.series
        told = {"quick": asked.quick, **figures(ready, measured)}
    console.print(as_table(measured.results))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=2) + "\n")
    if asked.docs:
        drawn = plots.draw(measured.series, asked.docs)
        paths = " ".join(map(str, drawn)) or "nothing: the plots need the extra bench (matplotlib)"
        console.print(f"drawn: {paths}")


def figures(ready: Server, measured: Measured) -> dict[str, Any]:
    """All that was measured, and on what."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processors": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("orphan-recovery", *PACKAGES)},
        "server": ready.settings(),
        "results": [result.as_dict() for result in measured.results],
        "series": measured.series,
    }


if __name__ == "__main__":
    main()
