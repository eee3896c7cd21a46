"""Constraints that do not hold for every row that is there are taken for no more than they say."""

from typing import LiteralString

import pytest

from orphan_recovery import ConfigurationError
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database
from tables_support import seen, sweep

JOBS = Target(name="jobs", table="jobs")


@pytest.fixture(autouse=True)
def since_18(blank: Database) -> None:
    if blank.one("SELECT current_setting('server_version_num')::int") < 180_000:
        pytest.skip("before Postgres 18 there are no such constraints")


def make(db: Database, columns: LiteralString, *more: LiteralString) -> None:
    db.do("CREATE TABLE jobs (status text NOT NULL, heartbeat_at timestamptz, " + columns + ")")
    for statement in more:
        db.do(statement)


async def test_an_orphan_from_before_its_time_was_required_is_seen(blank: Database) -> None:
    make(
        blank,
        "id text PRIMARY KEY, created_at timestamptz",
        "INSERT INTO jobs VALUES ('running', now() - interval '2 hours', 'old', NULL)",
        "ALTER TABLE jobs ADD NOT NULL created_at NOT VALID",
    )
    migrate(JOBS)
    assert [run.id for run in await seen(blank, JOBS)] == ["old"]
    report = await sweep(JOBS)
    assert (report.detected, report.failed) == (1, 1), "Postgres writes no such row"
    blank.do("ALTER TABLE jobs DROP CONSTRAINT jobs_created_at_not_null")
    assert (await sweep(JOBS)).recovered == 1


async def test_an_orphan_of_a_child_table_whose_time_is_not_required_is_marked(
    blank: Database,
) -> None:
    make(
        blank,
        "id text PRIMARY KEY, created_at timestamptz NOT NULL NO INHERIT",
        "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (jobs)",
        "INSERT INTO child VALUES ('running', now() - interval '2 hours', 'old', NULL)",
    )
    migrate(JOBS)
    assert (await sweep(JOBS)).recovered == 1


def test_a_key_that_may_be_null_in_rows_of_before_is_none(blank: Database) -> None:
    make(
        blank,
        "id text UNIQUE, created_at timestamptz",
        "ALTER TABLE jobs ADD CONSTRAINT known NOT NULL id NOT VALID",
    )
    with pytest.raises(ConfigurationError, match="no unique index of 'jobs' covers"):
        migrate(JOBS)
    blank.do("ALTER TABLE jobs VALIDATE CONSTRAINT known")
    migrate(JOBS)


def test_what_refuses_null_is_not_released(blank: Database) -> None:
    make(
        blank,
        "id text PRIMARY KEY, created_at timestamptz, slot int",
        "ALTER TABLE jobs ADD NOT NULL slot NOT VALID",
    )
    with pytest.raises(ConfigurationError, match="release has 'slot', which is NOT NULL"):
        migrate(JOBS.model_copy(update={"release": ("slot",)}))


async def test_a_condition_that_is_not_enforced_forbids_no_status(blank: Database) -> None:
    make(
        blank,
        "id text PRIMARY KEY, created_at timestamptz, CHECK (status <> 'crashed') NOT ENFORCED",
        "INSERT INTO jobs VALUES ('running', NULL, 'run', now() - interval '2 hours')",
    )
    migrate(JOBS)
    assert (await sweep(JOBS)).recovered == 1
