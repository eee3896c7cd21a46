"""Any runs table: the index that serves detection, and the plans that show it."""

from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.describe import runs_table
from orphan_recovery.detect import orphans
from orphan_recovery.doctor.table import explain
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database
from tables_support import do, names_in, request, simple


def test_an_index_that_an_interrupted_build_left_invalid_is_built_again(blank: Database) -> None:
    target = simple(blank)
    blank.do("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'jobs_in_flight'::regclass")
    assert [why.split(":")[0] for why in migrate(target).done] == ["an index that serves detection"]
    assert blank.one(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = 'jobs_in_flight'::regclass"
    )


async def test_the_index_follows_the_description(blank: Database, engine: AsyncEngine) -> None:
    """Else a status more means that every sweep reads the whole table, and nobody says so."""
    target = simple(blank, in_flight=("running",))
    more = target.model_copy(update={"in_flight": ("running", "queued")})
    assert migrate(more).done
    async with engine.connect() as connection:
        await connection.execute(text("SET enable_seqscan = off"))
        statement = orphans(await runs_table(connection, more), request(more))
        assert names_in(await explain(connection, statement)) == ["jobs_in_flight"]
    assert migrate(more).done == ()


LONG = "a_table_whose_name_is_as_long_as_it_may_be_which_is_63_bytes"


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
async def test_tables_whose_long_names_begin_alike_each_have_their_own_index(
    blank: Database, partitioned: bool
) -> None:
    targets = []
    for end in ("_a", "_b"):
        name = LONG + end
        table = sql.Identifier(name)
        parts = sql.SQL("PARTITION BY HASH (id)" if partitioned else "")
        columns = sql.SQL("id int PRIMARY KEY, status text, created_at timestamptz")
        do(blank, sql.SQL("CREATE TABLE {} ({}) {}").format(table, columns, parts))
        for rest in range(2 if partitioned else 0):
            do(
                blank,
                sql.SQL(
                    "CREATE TABLE {} PARTITION OF {} FOR VALUES WITH (MODULUS 2, REMAINDER {})"
                ).format(sql.Identifier(f"{name[:59]}{end}{rest}"), table, rest),
            )
        targets.append(Target(name=f"t{end}", table=name))
    for target in targets:
        migrate(target)
        assert migrate(target).done == ()
    served = blank.do(
        "SELECT c.relname AS name, array_agg(i.indisvalid) AS valid FROM pg_class c"
        " LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indpred IS NOT NULL"
        " WHERE c.relkind IN ('r', 'p') AND c.relname LIKE 'a_table%' GROUP BY 1"
    )
    assert len(served) == (6 if partitioned else 2)
    assert all(row["valid"] == [True] for row in served), served


# Plans.

STATUSES: dict[str, tuple[LiteralString, tuple[str, ...], str]] = {
    "text": ("text", ("queued", "running"), "done"),
    "varchar": ("varchar(20)", ("queued", "running"), "done"),
    "one word": ("text", ("running",), "done"),
    "char": ("char(10)", ("queued", "running"), "done"),
    "enum": ('odd."Mood %s"', ("queued", "running"), "done"),
    "integer": ("integer", ("1", "2"), "3"),
    "smallint": ("smallint", ("1", "2"), "3"),
    "domain": ("odd.free", ("queued", "running"), "done"),
    "domain with a condition": ("odd.bound", ("queued", "running"), "done"),
}


@pytest.mark.parametrize("kind", STATUSES)
@pytest.mark.parametrize("created", ["timestamptz", "timestamp"])
async def test_detection_reads_what_is_in_flight_by_index_and_nothing_else(
    blank: Database, engine: AsyncEngine, kind: str, created: LiteralString
) -> None:
    status, in_flight, done = STATUSES[kind]
    blank.do(
        "CREATE SCHEMA odd; CREATE TYPE odd.\"Mood %s\" AS ENUM ('queued', 'running', 'done',"
        " 'crashed'); CREATE DOMAIN odd.free AS text; CREATE DOMAIN odd.bound AS text CHECK"
        " (VALUE IN ('queued', 'running', 'done', 'crashed'))"
    )
    do(
        blank,
        sql.SQL(
            "CREATE TABLE t (id bigint PRIMARY KEY, status {status}, created_at {created});"
            "INSERT INTO t SELECT n, {done}, now() - n * interval '1 minute'"
            " FROM generate_series(1, 20000) AS n;"
            "INSERT INTO t SELECT -n, {running}, now() - n * interval '1 minute'"
            " FROM generate_series(1, 100) AS n"
        ).format(
            status=sql.SQL(status), created=sql.SQL(created), done=done, running=in_flight[-1]
        ),
    )
    crashed = "4" if done == "3" else "crashed"
    target = Target(name="t", table="t", in_flight=in_flight, crashed=crashed)
    migrate(target)
    blank.do("VACUUM ANALYZE t")
    async with engine.connect() as connection:
        table = await runs_table(connection, target)
        plan = await explain(connection, orphans(table, request(target)))
    assert names_in(plan) == ["t_in_flight"], plan
