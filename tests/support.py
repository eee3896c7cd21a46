"""What tests arrange the world with: rows, second connections, real processes."""

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, LiteralString, Self

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import make_url

_numbers = itertools.count()


class Database:
    """A test's own database, with a connection that commits each statement at once."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Self:
        self._connection = self.connect(autocommit=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def connect(self, *, autocommit: bool = False) -> psycopg.Connection[dict[str, Any]]:
        """A further connection, to hold a lock or a transaction of its own."""
        return psycopg.connect(self.url, autocommit=autocommit, row_factory=dict_row)

    def do(self, statement: LiteralString, *values: Any) -> list[dict[str, Any]]:
        cursor = self._connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []

    def one(self, statement: LiteralString, *values: Any) -> Any:
        [row] = self.do(statement, *values)
        [value] = row.values()
        return value

    def add_run(
        self,
        run_id: str,
        *,
        status: str = "running",
        worker: str | None = "worker-1",
        tenant: str | None = "tenant-1",
        age: str = "2 hours",
        beat: str | None = None,
    ) -> str:
        """A run created ``age`` ago, which last beat ``beat`` ago, if ever."""
        self.do(
            "INSERT INTO worker_runs (id, status, worker_id, tenant_id, task, created_at,"
            " started_at, heartbeat_at) VALUES (%s, %s, %s, %s, 'report',"
            " now() - %s::interval, now() - %s::interval, now() - %s::interval)",
            *(run_id, status, worker, tenant, age, age, beat),
        )
        return run_id

    def add_orphans(self, count: int) -> list[str]:
        """So many runs, each silent for between one and two hours; the first for longest."""
        self.do(
            "INSERT INTO worker_runs (id, status, worker_id, created_at) SELECT"
            " 'run-' || lpad(n::text, 6, '0'), 'running', 'worker-' || n %% 7,"
            " now() - interval '2 hours' + n * interval '1 hour' / %s"
            " FROM generate_series(1, %s) AS n",
            *(count, count),
        )
        return [row["id"] for row in self.do("SELECT id FROM worker_runs ORDER BY created_at")]

    def status(self, run_id: str) -> str:
        return str(self.one("SELECT status FROM worker_runs WHERE id = %s", run_id))

    def statuses(self) -> dict[str, str]:
        rows = self.do("SELECT id, status FROM worker_runs")
        return {str(row["id"]): str(row["status"]) for row in rows}

    def verdicts(self) -> list[dict[str, Any]]:
        return self.do("SELECT * FROM orphan_recovery.verdicts ORDER BY judged_at, run_id")

    def outcomes(self) -> dict[str, str]:
        """The latest outcome of each run that has a verdict."""
        return {row["run_id"]: row["outcome"] for row in self.verdicts()}

    def sweeps(self) -> list[dict[str, Any]]:
        return self.do("SELECT * FROM orphan_recovery.sweeps ORDER BY opened_at")

    def poison(self, *run_ids: str) -> None:
        """From now on every update of these runs raises."""
        self.do(
            "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'poisoned row %', OLD.id; END $$"
        )
        for run_id in run_ids:
            self.do(
                psycopg.sql.SQL(  # type: ignore[arg-type]
                    "CREATE TRIGGER {} BEFORE UPDATE ON worker_runs FOR EACH ROW"
                    " WHEN (OLD.id = {}) EXECUTE FUNCTION poison()"
                ).format(psycopg.sql.Identifier(f"poison_{run_id}"), run_id)
            )

    def await_lock_wait(self, sessions: int = 1) -> None:
        """Return once so many sessions of this database wait for a lock."""
        until(
            lambda: (
                self.one(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
                >= sessions
            ),
            f"{sessions} session(s) that wait for a lock",
        )


@contextmanager
def database_of_its_own(server: str, template: str = "template0") -> Iterator[str]:
    """The address of a database that is made for the block, and dropped at its end.

    Args:
        server: the address of any database of the server that is to have it.
        template: the name of the database that it is copied from.
    """
    # Two processes of tests may share a server.
    name = f"orphan_recovery_test_{os.getpid()}_{next(_numbers)}"
    address = make_url(server).set(drivername="postgresql")

    def as_admin(command: LiteralString, *names: str) -> None:
        statement = psycopg.sql.SQL(command).format(*map(psycopg.sql.Identifier, names))
        with psycopg.connect(address.render_as_string(hide_password=False), autocommit=True) as db:
            db.execute(statement)

    as_admin("CREATE DATABASE {} TEMPLATE {}", name, template)
    try:
        yield address.set(database=name).render_as_string(hide_password=False)
    finally:
        as_admin("DROP DATABASE {} WITH (FORCE)", name)


def until(holds: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Return once ``holds`` does; fail loudly if it never does."""
    began = time.monotonic()
    while not holds():
        waited = time.monotonic() - began
        assert waited < seconds, f"waited {seconds:g} s in vain for {what}"
        # The longer it takes, the seldomer: who is asked is often the one who has to get there.
        time.sleep(min(max(0.02, waited / 20), 0.25))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def open_in_the_ledger(
    db: Database, target: str = "default", age: int = 0, detected: int | None = None
) -> None:
    """A sweep that has looked, so many seconds ago, found so many orphans, and does not end."""
    db.do(
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, detected, opened_at) VALUES (gen_random_uuid(), %s,"
        " 'worker_runs', 'test', 'test', '30 min', '{}', '0', %s,"
        " now() - make_interval(secs => %s))",
        *(target, detected, age),
    )


def ended_in_the_ledger(db: Database, *, ago: str) -> None:
    """A sweep that found nothing, and ended well so long ago."""
    db.do(
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, in_flight, opened_at, ended_at, ended_as)"
        " VALUES (gen_random_uuid(), 'default', 'worker_runs', 'test', 'test', '30 min', '{}',"
        " '0', 0, now() - %s::interval, now() - %s::interval, 'completed')",
        *(ago, ago),
    )
