"""Data: a server, and databases full of runs that are made once and copied for each round.

The hazard is two sides that do not start alike. So every round of every side gets a fresh copy of
one template: the same pages, the same statistics, and a checkpoint just before (which a copy file
by file brings with it; what is small enough to be no measurement does without).
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import make_url

from orphan_recovery.database import database_url
from orphan_recovery.embedded import embedded_postgres
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target

LARGE: Final = 50_000
"""Rows of a database from which on it is copied by file, which checkpoints before and after."""

Connection = psycopg.Connection[dict[str, Any]]
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a database holds. Orphans lie among as many ended runs, behind all older ones."""

    rows: int
    orphans: int
    live: int = 1_000
    """In flight and no orphans: half of them young, half old and beating."""
    workers: int = 50
    """Each holds living runs too, where there are any: so no sweep takes the fleet for dead."""
    beaten: bool = False
    """Orphans have beaten once; else they show only their age."""

    def __post_init__(self) -> None:
        assert self.rows >= self.orphans + self.live, self


class Server:
    """A Postgres server with the templates that this process made on it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._templates: dict[object, str] = {}

    def connect(self) -> Connection:
        return connect(self.url)

    def template(self, fleet: Fleet) -> str:
        """The database that holds it, made when first asked for."""
        if fleet not in self._templates:
            name = self.create()
            fill(self.address(name), fleet)
            self._templates[fleet] = name
        return self._templates[fleet]

    @contextmanager
    def copy(self, fleet: Fleet) -> Iterator[str]:
        """The address of a fresh copy, dropped at the end."""
        name = self.create(self.template(fleet), by_file=fleet.rows >= LARGE)
        try:
            yield self.address(name)
        finally:
            self.drop(name)

    def create(self, template: str = "template0", *, by_file: bool = False) -> str:
        name = f"orphan_recovery_bench_{os.getpid()}_{next(_numbers)}"
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(template)
        )
        with self.connect() as admin:
            if by_file and admin.info.server_version >= 150_000:  # before, it was the only way
                create += sql.SQL(" STRATEGY FILE_COPY")
            admin.execute(create)
        return name

    def drop(self, name: str) -> None:
        with self.connect() as admin:
            drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
            admin.execute(drop.format(sql.Identifier(name)))

    def forget(self, fleet: Fleet) -> None:
        """Drop a template whose place is needed."""
        if fleet in self._templates:
            self.drop(self._templates.pop(fleet))

    def close(self) -> None:
        for name in self._templates.values():
            self.drop(name)
        self._templates.clear()

    def address(self, name: str) -> str:
        url = make_url(self.url).set(drivername="postgresql", database=name)
        return url.render_as_string(hide_password=False)

    def settings(self) -> dict[str, str]:
        """What of the server's configuration bears on the figures."""
        with self.connect() as admin:
            rows = admin.execute(
                "SELECT name, current_setting(name) AS value FROM pg_settings"
                " WHERE name = ANY (%s) ORDER BY name",
                [list(_SETTINGS)],
            ).fetchall()
        return {row["name"]: row["value"] for row in rows}


_SETTINGS: Final = (
    *("server_version", "shared_buffers", "max_wal_size", "checkpoint_timeout", "wal_level"),
    *("fsync", "synchronous_commit", "full_page_writes", "work_mem", "autovacuum", "jit"),
)


@contextmanager
def server() -> Iterator[Server]:
    """BENCH_DATABASE_URL, or an embedded server; both as they are configured."""
    own = os.environ.get("BENCH_DATABASE_URL")
    if own:
        ready = Server(own)
        try:
            yield ready
        finally:
            ready.close()
    else:
        with embedded_postgres() as url:
            yield Server(url)


def connect(url: str) -> Connection:
    return psycopg.connect(url, autocommit=True, row_factory=dict_row)


def fill(url: str, fleet: Fleet) -> None:
    """The product's own schema, and the fleet in it."""
    migrate(Target(), database_url(url))
    with connect(url) as db:
        db.execute(
            _FILL,
            {
                "rows": fleet.rows,
                "before_live": fleet.rows - fleet.live,
                # Every second row is an orphan where there are enough ended ones to lie between.
                "step": 2 if fleet.rows >= 2 * fleet.orphans + fleet.live else 1,
                "orphans": fleet.orphans,
                "workers": fleet.workers,
                "beaten": fleet.beaten,
            },
        )
        db.execute("VACUUM (ANALYZE) worker_runs")


_FILL: Final = """
INSERT INTO worker_runs (id, tenant_id, worker_id, task, input_json, status, success, output_json,
                         created_at, started_at, heartbeat_at, completed_at)
SELECT gen_random_uuid()::text, 'tenant-' || n %% 40, 'worker-' || (n / 2) %% %(workers)s, 'report',
       jsonb_build_object('number', n), CASE WHEN is_live OR is_orphan THEN 'running'
       ELSE 'completed' END, CASE WHEN NOT (is_live OR is_orphan) THEN true END,
       CASE WHEN NOT (is_live OR is_orphan) THEN '{"rows": 1042}'::jsonb END,
       created_at, created_at + interval '1 second',
       CASE WHEN is_live AND n %% 2 = 0 THEN now()
            WHEN is_orphan AND %(beaten)s THEN created_at + interval '1 minute' END,
       CASE WHEN NOT (is_live OR is_orphan) THEN created_at + interval '10 seconds' END
FROM (
    SELECT n, n > %(before_live)s::int AS is_live,
           n <= %(before_live)s::int AND n > %(before_live)s::int - %(step)s::int * %(orphans)s::int
           AND (%(before_live)s::int - n) %% %(step)s::int = 0 AS is_orphan,
           CASE WHEN n > %(before_live)s::int AND n %% 2 = 1
                THEN now() - (%(rows)s::int - n) * interval '100 microseconds'
                ELSE now() - interval '2 days' - (%(rows)s::int - n) * interval '1 second' END
           AS created_at
    FROM generate_series(1, %(rows)s::int) AS n
) AS run
"""
