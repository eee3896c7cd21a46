"""Any runs table: what cannot be swept is refused, with a reason and before anything is written."""

from typing import Any, LiteralString

import pytest
from psycopg import sql

from orphan_recovery import ConfigurationError
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database
from tables_support import do, seen


@pytest.mark.parametrize(
    ("make", "what"),
    [
        ("CREATE VIEW v AS SELECT * FROM t", "a view"),
        ("CREATE MATERIALIZED VIEW v AS SELECT * FROM t", "a materialized view"),
        (
            "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
            "CREATE FOREIGN TABLE v (id int, status text, created_at timestamptz) SERVER s",
            "a foreign table",
        ),
        ("CREATE SEQUENCE v", "a sequence"),
    ],
)
async def test_what_is_no_table_is_refused_by_its_kind(
    blank: Database, make: LiteralString, what: str
) -> None:
    blank.do("CREATE TABLE t (id int PRIMARY KEY, status text, created_at timestamptz)")
    blank.do(make)
    target = Target(name="v", table="v")
    with pytest.raises(ConfigurationError, match=rf"'v', which is {what}: .*name the table"):
        migrate(target)
    with pytest.raises(ConfigurationError, match=f"'v', which is {what}"):
        await seen(blank, target)
    assert blank.one("SELECT to_regnamespace('orphan_recovery')") is None


@pytest.mark.parametrize(
    ("columns", "described", "told"),
    [
        ("id int", {}, "no unique index .* covers"),
        ("id int PRIMARY KEY", {"columns": {"error": "message"}}, "'message', but table"),
        ("id int PRIMARY KEY, error int", {}, "error: .* is integer, where text, json"),
        ("id int PRIMARY KEY, heartbeat_at date", {}, "heartbeat_at: .* is date: a time must"),
        (
            "id int PRIMARY KEY, error text GENERATED ALWAYS AS ('x') STORED",
            {},
            "error: .* is generated, and cannot be written",
        ),
        ("id int PRIMARY KEY", {"release": ("slot",)}, "release is 'slot', but table"),
        ("id int PRIMARY KEY, slot int NOT NULL", {"release": ("slot",)}, "release.*'slot'.*NULL"),
        (
            "id int PRIMARY KEY, slot int GENERATED ALWAYS AS (1) STORED",
            {"release": ("slot",)},
            "release has 'slot', which is generated",
        ),
    ],
)
def test_a_table_that_does_not_fit_its_description_is_refused(
    blank: Database, columns: LiteralString, described: dict[str, Any], told: str
) -> None:
    do(
        blank,
        sql.SQL("CREATE TABLE t (status text, created_at timestamptz, {})").format(
            sql.SQL(columns)
        ),
    )
    with pytest.raises(ConfigurationError, match=told):
        migrate(Target(name="t", table="t", **described))


@pytest.mark.parametrize(
    ("status", "described", "told"),
    [
        (
            "mood",
            {"in_flight": ("running",)},
            "crashed has 'crashed'.*the enum mood has 'running', 'done'",
        ),
        ("mood", {"crashed": "done"}, "in_flight has 'queued'.*the enum mood has"),
        ("text CHECK (t.status <> 'crashed')", {}, "crashed has 'crashed'.*has the condition"),
        ("text CHECK (t.status <> '<value>')", {"crashed": "<value>"}, "crashed has '<value>'"),
        (
            "few",
            {"in_flight": ("running",)},
            "crashed has 'crashed', which column 'status' of 't' cannot hold",
        ),
        ("few", {"crashed": "done"}, "in_flight has 'queued', which column 'status'"),
        ("integer", {}, "has '[a-z]+', which column 'status' of 't' cannot hold"),
        (
            "varchar(7)",
            {"crashed": "abandoned"},
            "crashed has 'abandoned', which column 'status' of 't' cannot hold",
        ),
    ],
)
async def test_a_word_that_the_status_cannot_hold_is_refused_by_name(
    blank: Database, status: LiteralString, described: dict[str, Any], told: str
) -> None:
    blank.do(
        "CREATE TYPE mood AS ENUM ('running', 'done');"
        "CREATE DOMAIN few AS text CHECK (VALUE IN ('running', 'done'))"
    )
    do(
        blank,
        sql.SQL("CREATE TABLE t (id int PRIMARY KEY, status {}, created_at timestamptz)").format(
            sql.SQL(status)
        ),
    )
    with pytest.raises(ConfigurationError, match=told):
        migrate(Target(name="t", table="t", **described))
    assert blank.one("SELECT to_regnamespace('orphan_recovery')") is None
