"""Scale: very many runs in flight in one table, and very many targets. It takes minutes.

The hazard is a figure of a small part, multiplied. So what is told of ten million runs and of a
thousand targets is measured on as many, once: each database is used a single time, and dropped
before the next one is made, for the disk's sake.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from psycopg import sql

from benchmarks.data import Connection, Fleet, Server, connect, fill
from benchmarks.flow import prefect_server
from benchmarks.processes import ROOT, Longest, Ran, run, watched
from benchmarks.rates import SWEEP, check_marked_once
from benchmarks.results import Measured, Result, Side, Size
from benchmarks.sides import THRESHOLD_MINUTES

RUNS: Final = 5
"""In flight in the table of each target."""
EACH: Final = 10
"""Of so many targets, one has an orphan: the first, and every tenth after it."""


def in_flight(server: Server, size: Size) -> Measured:
    """All of a table in flight: a sweep that finds nothing, and one that marks nearly all."""
    runs = size.all_in_flight
    idle, look, quiet = _swept(server, Fleet(runs, 0, live=runs))
    marking, longest, marked = _swept(server, Fleet(runs + 1_000, runs))
    return Measured(
        [
            Result(
                f"a sweep that finds nothing, {runs:,} in flight",
                [idle.seconds],
                unit="s",
                sides=_about(idle, look, quiet),
            ),
            Result(
                f"a sweep that marks {runs:,} orphans",
                [marking.seconds],
                unit="s",
                sides=[
                    Side("rate", [marking.rate], "orphans/s"),
                    *_about(marking, longest, marked),
                ],
                notes=["each orphan was marked once, with one verdict, as the ledger says"],
            ),
        ]
    )


def _swept(server: Server, fleet: Fleet) -> tuple[Ran, Longest, float]:
    """One sweep of a database of its own; its longest transaction; GB of the database after it."""
    with _database(server) as url:
        fill(url, fleet)
        server.drop(server.create(by_file=True))  # a copy file by file begins with a checkpoint
        with watched(server, url) as longest:
            ran = run(url, *SWEEP)
        assert ran.count == fleet.orphans, ran
        check_marked_once(url, fleet.orphans)
        with connect(url) as db:
            row = db.execute("SELECT pg_database_size(current_database()) AS bytes").fetchone()
    assert row is not None
    return ran, longest, row["bytes"] / 1e9


def _about(ran: Ran, longest: Longest, gigabytes: float) -> list[Side]:
    return [
        Side("longest transaction", [longest.seconds], "s"),
        Side("peak memory", [ran.peak_kib / 1024], "MiB"),
        Side("the database after it", [gigabytes], "GB"),
    ]


def targets(server: Server, size: Size) -> Measured:
    """A file of many targets: one command sweeps them all, and so does one flow, of fewer."""
    by_command, by_flow = list[float](), list[float]()
    with _described(server, size.targets) as (url, file):
        for sweeps in (1, 2):  # the second finds nothing
            by_command.append(_command(url, **file))
            _check(url, size.targets, sweeps)
    with (
        prefect_server() as api,
        tempfile.TemporaryDirectory(prefix="orphan-bench-") as home,
        _described(server, size.flow_targets) as (url, file),
    ):
        prefect = {"PREFECT_API_URL": api, "PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
        for sweeps in (1, 2):
            ran = run(url, "benchmarks.flow_sides", "targets", 1, 0, **prefect, **file)
            by_flow.append(ran.seconds)
            _check(url, size.flow_targets, sweeps)
    return Measured(
        [
            *_told("orphan-recovery sweep --all-targets", size.targets, by_command),
            *_told("recover-all-targets, one at a time", size.flow_targets, by_flow),
        ]
    )


def _command(url: str, **environment: str) -> float:
    """Seconds of the whole process that sweeps every target."""
    command = str(Path(sys.executable).with_name("orphan-recovery"))
    began = time.perf_counter()
    ran = subprocess.run(
        [command, "sweep", "--all-targets"],
        cwd=ROOT,
        env={**os.environ, "ORPHAN_RECOVERY_DATABASE_URL": url, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.perf_counter() - began
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    return took


def _told(what: str, count: int, took: list[float]) -> list[Result]:
    """Of the sweep that marks, and of the one that finds nothing."""
    found = (f"an orphan in every {EACH}th", "nothing to find")
    return [
        Result(
            f"{what}, {count:,} targets, {there}",
            [seconds],
            unit="s",
            sides=[Side("a target", [seconds / count * 1000], "ms")],
        )
        for there, seconds in zip(found, took, strict=True)
    ]


@contextmanager
def _database(server: Server) -> Iterator[str]:
    """The address of a database that is dropped at the end."""
    name = server.create()
    try:
        yield server.address(name)
    finally:
        server.drop(name)


@contextmanager
def _described(server: Server, count: int) -> Iterator[tuple[str, dict[str, str]]]:
    """A database with so many tables, and the environment that names the file about them."""
    with (
        _database(server) as url,
        tempfile.TemporaryDirectory(prefix="orphan-bench-") as folder,
    ):
        fill(url, Fleet(0, 0, live=0))  # the ledger, and the table that all others are made like
        with connect(url) as db:
            for number in range(count):
                _make(db, number)
        file = Path(folder) / "orphan-recovery.toml"
        file.write_text(
            "".join(
                f'[targets.number-{number}]\ntable = "{_name(number)}"\n'
                f"threshold_minutes = {THRESHOLD_MINUTES}\n"
                for number in range(count)
            )
        )
        yield url, {"ORPHAN_RECOVERY_CONFIG": str(file)}


def _make(db: Connection, number: int) -> None:
    """A table with the product's own columns and indexes, and a handful of runs in flight."""
    orphans = 1 if number % EACH == 0 else 0
    name = sql.Identifier(_name(number))
    db.execute(sql.SQL("CREATE TABLE {} (LIKE worker_runs INCLUDING ALL)").format(name))
    add = sql.SQL(
        "INSERT INTO {} (worker_id, task, status, created_at, started_at, heartbeat_at)"
        " SELECT 'worker-1', 'report', 'running', created_at, created_at,"
        " CASE WHEN n > %(orphans)s::int THEN now() END"
        " FROM (SELECT n, now() - interval '2 days' - n * interval '1 second' AS created_at"
        " FROM generate_series(1, %(runs)s::int) AS n) AS run"
    )
    db.execute(add.format(name), {"orphans": orphans, "runs": RUNS})


def _check(url: str, count: int, sweeps: int) -> None:
    """Hold ledger and tables against what is there: an orphan in every tenth, marked once."""
    orphans = len(range(0, count, EACH))
    with connect(url) as db:
        ledger = db.execute(
            "SELECT (SELECT count(*) FROM orphan_recovery.verdicts) AS verdicts,"
            " (SELECT count(DISTINCT (target, run_id)) FROM orphan_recovery.verdicts"
            " WHERE outcome = 'marked') AS marked,"
            " (SELECT count(*) FROM orphan_recovery.sweeps WHERE ended_as = 'completed') AS sweeps"
        ).fetchone()
        select = sql.SQL("SELECT FROM {} WHERE status = 'crashed'")
        names = (sql.Identifier(_name(number)) for number in range(count))
        crashed = sum(db.execute(select.format(name)).rowcount for name in names)
    expected = {"verdicts": orphans, "marked": orphans, "sweeps": sweeps * count}
    assert (ledger, crashed) == (expected, orphans), (ledger, crashed, expected)


def _name(number: int) -> str:
    return f"runs_{number}"
