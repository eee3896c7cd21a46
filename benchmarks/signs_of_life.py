"""What proof of life costs, and how soon a death is known by each kind of evidence.

    python benchmarks/signs_of_life.py [--runs 10000] [--beats 6] [--json FILE]

Real processes, a real Postgres (BENCH_DATABASE_URL, or an embedded one). Every figure is the
server's own: statements, transactions, bytes of write-ahead log, heap-only updates. The times from
death to verdict are bound by the threshold, whose least is a minute, and by how often one sweeps:
they are shown with both, and for nothing but their order.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row
from rich.console import Console
from rich.table import Table

from orphan_recovery.alive.beaters import beater_of
from orphan_recovery.database import database_url
from orphan_recovery.embedded import embedded_postgres
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target

INTERVAL = 2.0
SWEEP_EVERY = 2.0
KINDS: dict[str, dict[str, Any]] = {
    "run heartbeat": {},
    "worker heartbeat": {
        "columns": {"heartbeat_at": False},
        "worker_heartbeat": {
            "table": "workers",
            "key": "id",
            "run_key": "worker_id",
            "last_seen": "seen_at",
        },
    },
    "lock": {"lock": "worker"},
    "age": {"columns": {"heartbeat_at": False}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--beats", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.hold:
        hold(*asked.hold)
        return
    with ExitStack() as stack:
        own = os.environ.get("BENCH_DATABASE_URL")
        url = own or stack.enter_context(embedded_postgres())
        figures = {"beats": beats(url, asked.runs, asked.beats), "deaths": deaths(url)}
    show(figures)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


def target_of(kind: str) -> Target:
    name = kind.replace(" ", "-")
    table = f"runs_{kind.replace(' ', '_')}"
    about = {"name": name, "table": table, "threshold_minutes": 1, "heartbeat_seconds": INTERVAL}
    return Target(**{**about, **KINDS[kind]})


def beats(url: str, runs: int, count: int) -> dict[str, Any]:
    """So many runs in flight of one process, over so many beats."""
    target = Target(name="beats", table="runs_beats", heartbeat_seconds=INTERVAL)
    with connect(url) as db:
        make_table(db, "runs_beats")
        migrate(target, database_url(url))
        db.execute(
            "INSERT INTO runs_beats (id, status, worker_id) SELECT 'run-' || n, 'running', 'w'"
            " FROM generate_series(1, %s) AS n",
            [runs],
        )
        db.execute("VACUUM ANALYZE runs_beats")
        beater = beater_of(target, database_url(url), INTERVAL)
        kept = [beater.keep(f"run-{n}", "w", lambda _: None) for n in range(1, runs + 1)]
        time.sleep(3 * INTERVAL)  # the first beats come as runs are taken
        before, began = server(db), time.monotonic()
        time.sleep(count * INTERVAL)
        after, took = server(db), time.monotonic() - began
        oldest = db.execute(
            "SELECT extract(epoch FROM now() - min(heartbeat_at)) AS s FROM runs_beats"
        )
        silence = float((oldest.fetchone() or {})["s"])
        for one in kept:
            beater.release(one)
    did = {name: after[name] - before[name] for name in before}
    return {
        "runs": runs,
        "interval_seconds": INTERVAL,
        "connections": after["connections"],
        "beats": round(did["updated"] / runs, 1),
        "transactions_a_second": round(did["commits"] / took, 2),
        "log_bytes_a_second": round(did["log_bytes"] / took),
        "log_bytes_a_beat_of_a_run": round(did["log_bytes"] / max(did["updated"], 1)),
        "heap_only_share": round(did["hot"] / max(did["updated"], 1), 3),
        "longest_silence_seconds": round(silence, 1),
    }


def deaths(url: str) -> list[dict[str, Any]]:
    """One worker for each kind of evidence, all killed at once; then sweeps until all are known."""
    with connect(url) as db:
        db.execute("CREATE TABLE workers (id text PRIMARY KEY, seen_at timestamptz)")
        targets = {kind: target_of(kind) for kind in KINDS}
        workers = {}
        for kind, target in targets.items():
            make_table(db, target.table)
            migrate(target, database_url(url))
            insert = psycopg.sql.SQL(
                "INSERT INTO {} (id, status, worker_id, started_at) VALUES"
                " ('run', 'running', {}, now())"
            )
            db.execute(insert.format(psycopg.sql.Identifier(target.table), kind))
            db.execute("INSERT INTO workers VALUES (%s, now())", [kind])
            command = [sys.executable, __file__, "--hold", url, kind, "run"]
            workers[kind] = subprocess.Popen(command, stdout=subprocess.PIPE)
        for worker in workers.values():
            assert worker.stdout is not None
            worker.stdout.readline()
        time.sleep(2 * INTERVAL)
        for worker in workers.values():
            worker.kill()
            worker.wait()
        died = time.monotonic()
        known: dict[str, float] = {}
        while len(known) < len(KINDS) and time.monotonic() - died < 180:
            for kind, target in targets.items():
                if kind not in known and asyncio.run(swept(url, target)):
                    known[kind] = time.monotonic() - died
            time.sleep(SWEEP_EVERY)
    return [
        {
            "evidence": kind,
            "threshold_seconds": 2 * INTERVAL if kind == "lock" else 60,
            "sweep_every_seconds": SWEEP_EVERY,
            "death_to_verdict_seconds": round(seconds, 1),
        }
        for kind, seconds in known.items()
    ]


async def swept(url: str, target: Target) -> bool:
    os.environ["ORPHAN_RECOVERY_DATABASE_URL"] = url
    report = await run_sweep(SweepRequest(asked_by="benchmark", target=target))
    if report.error:
        raise SystemExit(report.headline())
    return report.recovered > 0


def hold(url: str, kind: str, run_id: str) -> None:
    """The worker: holds its run until it is killed."""
    target = target_of(kind)
    if kind != "age":
        beater_of(target, database_url(url), INTERVAL).keep(run_id, kind, lambda _: None)
    print("holding", flush=True)  # noqa: T201 - read by the process that kills this one
    time.sleep(600)


def connect(url: str) -> psycopg.Connection[dict[str, Any]]:
    return psycopg.connect(url, autocommit=True, row_factory=dict_row)


def make_table(db: psycopg.Connection[dict[str, Any]], name: str) -> None:
    statement = psycopg.sql.SQL(
        "CREATE TABLE {} (id text PRIMARY KEY, status text NOT NULL, worker_id text,"
        " created_at timestamptz NOT NULL DEFAULT now(), started_at timestamptz,"
        " heartbeat_at timestamptz, completed_at timestamptz, error text)"
        " WITH (fillfactor = 50)"
    )
    db.execute(statement.format(psycopg.sql.Identifier(name)))


def server(db: psycopg.Connection[dict[str, Any]]) -> dict[str, int]:
    """The server's own counters."""
    db.execute("SELECT pg_stat_clear_snapshot()")
    [row] = db.execute(
        "SELECT (pg_current_wal_lsn() - '0/0')::bigint AS log_bytes,"
        " (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()) AS commits,"
        " n_tup_upd AS updated, n_tup_hot_upd AS hot,"
        " (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orphan-recovery')"
        " AS connections FROM pg_stat_user_tables WHERE relname = 'runs_beats'"
    ).fetchall()
    return {name: int(value) for name, value in row.items()}


def show(figures: dict[str, Any]) -> None:
    console = Console(width=100)
    table = Table(title="Beats of one process", title_justify="left")
    for column in ("figure", "value"):
        table.add_column(column)
    for name, value in figures["beats"].items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)
    table = Table(title="From death to verdict", title_justify="left")
    for column in ("evidence", "threshold", "sweep every", "death to verdict"):
        table.add_column(column)
    for row in figures["deaths"]:
        _, *numbers = row.values()
        table.add_row(row["evidence"], *(f"{number:g} s" for number in numbers))
    console.print(table)


if __name__ == "__main__":
    main()
