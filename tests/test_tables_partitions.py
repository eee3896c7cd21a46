"""Partitioned tables: every part is swept, marked and served by its own index."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery import ConfigurationError
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import orphans
from orphan_recovery.doctor.table import explain
from orphan_recovery.doubt import are_writers_kept_out
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema import migrate as schema
from orphan_recovery.schema.migrate import migrate, unmigrate
from orphan_recovery.summarize import summarize_target
from orphan_recovery.target import Columns, Target
from support import Database
from tables_support import do, names_in, request, sweep

BY_RANGE: LiteralString = """
CREATE TABLE events (
    id bigint, "createdAt" timestamptz NOT NULL, status text NOT NULL, error text,
    PRIMARY KEY (id, "createdAt")
) PARTITION BY RANGE ("createdAt");
CREATE TABLE "events old" PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2020-01-01');
CREATE TABLE events_new PARTITION OF events FOR VALUES FROM ('2020-01-01') TO (MAXVALUE)
"""
BY_STATUS: LiteralString = """
CREATE TABLE events (
    id bigint, "createdAt" timestamptz NOT NULL, status text NOT NULL, error text,
    PRIMARY KEY (id, status)
) PARTITION BY LIST (status);
CREATE TABLE events_open PARTITION OF events FOR VALUES IN ('queued', 'running');
CREATE TABLE events_over PARTITION OF events DEFAULT
"""
IN_TWO_STEPS: LiteralString = """
CREATE SCHEMA parts;
CREATE TABLE events (
    id bigint, "createdAt" timestamptz NOT NULL, status text NOT NULL, error text,
    shard int NOT NULL DEFAULT 1, PRIMARY KEY (id, "createdAt", shard)
) PARTITION BY RANGE ("createdAt");
CREATE TABLE parts.old PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2020-01-01')
    PARTITION BY LIST (shard);
CREATE TABLE parts.old_1 PARTITION OF parts.old FOR VALUES IN (1);
CREATE TABLE parts.old_2 PARTITION OF parts.old DEFAULT;
CREATE TABLE parts.new PARTITION OF events FOR VALUES FROM ('2020-01-01') TO (MAXVALUE)
    PARTITION BY HASH (id);
CREATE TABLE parts.new_0 PARTITION OF parts.new FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE parts.new_1 PARTITION OF parts.new FOR VALUES WITH (MODULUS 2, REMAINDER 1)
"""
PARTITIONED: dict[str, tuple[LiteralString, tuple[str, ...], int]] = {
    "by range": (BY_RANGE, ("id", "createdAt"), 3),
    "by status": (BY_STATUS, ("id",), 3),
    "in two steps": (IN_TWO_STEPS, ("id", "createdAt", "shard"), 7),
}
every_partitioned = pytest.mark.parametrize("how", PARTITIONED)


def events(blank: Database, how: str) -> Target:
    ddl, key, _ = PARTITIONED[how]
    blank.do(ddl)
    blank.do(
        'INSERT INTO events (id, status, "createdAt") VALUES'
        " (1, 'running', '2019-05-06'), (2, 'queued', now() - interval '2 hours'),"
        " (3, 'running', now() - interval '1 minute'), (4, 'completed', '2019-05-06'),"
        " (5, 'running', now() - interval '2 hours')"
    )
    return Target(name="events", table="events", columns=Columns(id=key, created_at="createdAt"))


def indexes(blank: Database) -> dict[str, list[bool]]:
    """For each part of the table, the whole among them: its partial indexes, and if they serve."""
    rows = blank.do(
        "SELECT p.relid::regclass::text AS part, i.indexrelid IS NOT NULL AS is_there,"
        " i.indisvalid AND (p.level = 0 OR EXISTS ("
        " SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid)) AS serves"
        " FROM pg_partition_tree('events') p"
        " LEFT JOIN pg_index i ON i.indrelid = p.relid AND i.indpred IS NOT NULL"
    )
    found: dict[str, list[bool]] = {row["part"]: [] for row in rows}
    for row in rows:
        found[row["part"]] += [row["serves"]] if row["is_there"] else []
    return found


@every_partitioned
def test_every_part_has_its_valid_index_attached_and_none_twice(blank: Database, how: str) -> None:
    target = events(blank, how)
    assert migrate(target).done
    made = indexes(blank)
    assert len(made) == PARTITIONED[how][2]
    assert all(part and all(part) for part in made.values()), made
    assert migrate(target).done == ()
    assert indexes(blank) == made
    unmigrate(target)
    assert not any(indexes(blank).values())
    assert blank.one("SELECT count(*) FROM events") == 5


@every_partitioned
async def test_the_orphans_of_every_part_are_marked_and_may_move_to_another(
    blank: Database, how: str
) -> None:
    target = events(blank, how)
    migrate(target)
    report = await sweep(target)
    assert (report.error, report.failed, report.recovered) == (None, 0, 3)
    rows = blank.do("SELECT id, status, tableoid::regclass::text AS part FROM events ORDER BY id")
    assert [row["status"] for row in rows] == [
        *("crashed", "crashed", "running", "completed", "crashed")
    ]
    if how == "by status":
        assert {row["part"] for row in rows if row["status"] == "crashed"} == {"events_over"}
    assert [v["outcome"] for v in blank.verdicts()] == ["marked"] * 3
    assert (await sweep(target)).detected == 0
    assert (await summarize_target(target))["total_crashed"] == 3


async def test_a_mark_hits_one_row_where_an_id_is_unique_only_together_with_its_status(
    blank: Database,
) -> None:
    """A table in parts by status can have no other unique index."""
    target = events(blank, "by status")
    blank.do(
        "DELETE FROM events WHERE id <> 1;"
        'INSERT INTO events (id, status, "createdAt") VALUES'
        " (1, 'completed', now() - interval '2 hours'), (1, 'queued', now())"
    )
    migrate(target)
    assert (await sweep(target)).recovered == 1
    rows = blank.do("SELECT status, error IS NULL AS untouched FROM events ORDER BY status")
    assert [tuple(row.values()) for row in rows] == [
        *(("completed", True), ("crashed", False), ("queued", True))
    ]


async def test_a_run_that_its_end_moves_to_another_part_while_the_sweep_waits_is_left_alone(
    blank: Database,
) -> None:
    target = events(blank, "by status")
    migrate(target)
    with blank.connect() as worker:
        worker.execute("UPDATE events SET status = 'completed' WHERE id = 1")
        sweeping = asyncio.ensure_future(sweep(target))
        await asyncio.to_thread(blank.await_lock_wait)
        worker.commit()
        report = await sweeping
    assert (report.error, report.failed, report.recovered) == (None, 0, 2)
    assert blank.outcomes()["1"] == "finished_first"
    assert blank.one("SELECT status FROM events WHERE id = 1") == "completed"


@every_partitioned
async def test_detection_in_a_partitioned_table_reads_by_the_indexes_of_its_parts(
    blank: Database, engine: AsyncEngine, how: str
) -> None:
    target = events(blank, how)
    blank.do(
        "INSERT INTO events (id, status, \"createdAt\") SELECT n, 'completed',"
        " now() - n * interval '1 day' FROM generate_series(10, 10000) AS n"
    )
    migrate(target)
    blank.do("ANALYZE events")
    async with engine.connect() as connection:
        await connection.execute(text("SET enable_seqscan = off"))
        statement = orphans(await runs_table(connection, target), request(target))
        plan = await explain(connection, statement)
    used = names_in(plan)
    assert used
    # One that holds nothing but what is in flight may be read by any index.
    fit = {name for name in used if name.endswith("_in_flight")} | {"events_open_pkey"}
    assert set(used) <= fit


LATER: dict[str, LiteralString] = {
    "by range": (
        "ALTER TABLE events DETACH PARTITION events_new; CREATE TABLE events_newer"
        " PARTITION OF events FOR VALUES FROM ('2020-01-01') TO ('2099-01-01')"
    ),
    "by status": (
        "ALTER TABLE events DETACH PARTITION events_over; CREATE TABLE events_failed"
        " PARTITION OF events FOR VALUES IN ('failed')"
    ),
    "in two steps": (
        "ALTER TABLE events DETACH PARTITION parts.new; CREATE TABLE parts.newer"
        " PARTITION OF events FOR VALUES FROM ('2020-01-01') TO ('2099-01-01')"
        " PARTITION BY HASH (id); CREATE TABLE parts.newer_0 PARTITION OF parts.newer"
        " FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    ),
}


@every_partitioned
def test_a_part_that_came_later_is_served_and_another_migration_adds_nothing(
    blank: Database, how: str
) -> None:
    target = events(blank, how)
    migrate(target)
    blank.do(LATER[how])
    before = indexes(blank)
    assert all(part and all(part) for part in before.values()), before
    assert migrate(target).done == ()
    assert indexes(blank) == before


@pytest.mark.parametrize("how", ["by range", "in two steps"])
def test_a_migration_that_was_cut_off_is_completed_by_the_next(blank: Database, how: str) -> None:
    """At every point between two of its statements."""
    target = events(blank, how)
    whole = migrate(target)
    assert whole.done
    made = indexes(blank)
    built = [
        (row["schema"], row["name"])
        for row in blank.do(
            "SELECT n.nspname AS schema, c.relname AS name FROM pg_partition_tree('events') p"
            " JOIN pg_index i ON i.indrelid = p.relid AND i.indpred IS NOT NULL"
            " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = relnamespace"
            " WHERE p.isleaf ORDER BY 1, 2"
        )
    ]
    definitions = {
        (schema, name): blank.one(
            "SELECT pg_get_indexdef(format('%%I.%%I', %s::text, %s::text)::regclass)", schema, name
        )
        for schema, name in built
    }
    root = blank.do(
        "SELECT c.relname AS name, pg_get_indexdef(c.oid) AS told FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid"
        " WHERE indrelid = 'events'::regclass AND indpred IS NOT NULL"
    )
    for reached in range(len(built) + 1):
        for index in root:
            do(blank, sql.SQL("DROP INDEX {}").format(sql.Identifier(index["name"])))
            do(blank, sql.SQL(index["told"]))  # ON ONLY: as a migration makes it first
        for name in built[:reached]:
            do(blank, sql.SQL(definitions[name]))
        migrate(target)
        assert indexes(blank) == made, f"cut off after {reached} of the parts"
        assert migrate(target).done == ()


def test_the_migration_of_a_partitioned_table_gives_up_rather_than_hold_up_writers(
    blank: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of the whole needs a lock that writers would queue behind."""
    monkeypatch.setattr(schema, "LOCK_TIMEOUT_MS", 500)
    target = events(blank, "by range")
    write: LiteralString = (
        "INSERT INTO events (id, status, \"createdAt\") VALUES (%s, 'running', now())"
    )
    with ThreadPoolExecutor() as threads, blank.connect() as slow, blank.connect() as other:
        slow.execute(write, [10])
        migrating = threads.submit(migrate, target)
        blank.await_lock_wait()
        other.execute("SET lock_timeout = '10s'")
        other.execute(write, [11])
        other.commit()
        slow.commit()
        with pytest.raises(ConfigurationError, match="a lock on the runs table was not to be had"):
            migrating.result()
    migrate(target)
    assert all(part and all(part) for part in indexes(blank).values())


async def test_a_part_that_is_locked_by_itself_is_seen(
    blank: Database, engine: AsyncEngine
) -> None:
    """As by an index that is built on one partition: its runs cannot beat either."""
    blank.do(
        "CREATE TABLE jobs (id int, status text, at timestamptz, PRIMARY KEY (id, at))"
        " PARTITION BY RANGE (at)"
    )
    blank.do(
        "CREATE TABLE jobs_old PARTITION OF jobs FOR VALUES FROM (MINVALUE) TO ('2020-01-01')"
        " PARTITION BY RANGE (at)"
    )
    blank.do("CREATE TABLE jobs_oldest PARTITION OF jobs_old DEFAULT")
    blank.do("CREATE TABLE another (id int)")
    target = Target(
        table="jobs",
        in_flight=("running",),
        terminal=("crashed",),
        columns=Columns(id=("id", "at"), created_at="at"),
    )

    async def kept_out_by_a_lock_of(table: LiteralString) -> bool:
        with blank.connect() as indexing:
            indexing.execute("LOCK TABLE " + table + " IN SHARE MODE")
            async with engine.connect() as db:
                return await are_writers_kept_out(db, SweepRequest(asked_by="t", target=target))

    assert await kept_out_by_a_lock_of("jobs_oldest")
    assert await kept_out_by_a_lock_of("ONLY jobs_old")
    assert not await kept_out_by_a_lock_of("another")
