"""Several targets that sweep one table: none takes from it what another needs."""

from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from sqlalchemy import make_url

from orphan_recovery import ConfigurationError
from orphan_recovery.doctor.examine import examine
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.targets import find_target, load_targets
from sql_support import a_role, make, printed, psql, seen_by
from support import Database, database_of_its_own
from tables_support import configure, sweep

TWO = """
[targets.held]
table = "jobs"
in_flight = ["doing"]
crashed = "failed"
terminal = ["done", "failed"]
truth_trigger = true
[targets.waiting]
table = "public.jobs"
in_flight = ["todo"]
crashed = "expired"
terminal = ["done", "expired"]
truth_trigger = true
columns = { worker_id = false }
"""
JOBS: LiteralString = (
    "CREATE TABLE jobs (id int PRIMARY KEY, status text NOT NULL, worker_id text,"
    " created_at timestamptz NOT NULL)"
)
INDEX: LiteralString = "SELECT pg_get_indexdef('jobs_in_flight'::regclass)"


def refused(db: Database, statement: LiteralString) -> bool:
    try:
        db.do(statement)
    except psycopg.errors.RaiseException:
        return True
    return False


@pytest.mark.parametrize("first", ["held", "waiting"])
async def test_trigger_and_index_are_made_for_all_of_them_by_whichever_comes_first(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    blank.do(JOBS)
    configure(tmp_path, monkeypatch, TWO, first)
    assert len(migrate(find_target(first)).done) == 3
    for name in ("waiting", "held"):
        assert migrate(find_target(name)).done == ()
        lines = {line.about: line for line in await examine(find_target(name))}
        assert lines["truth trigger"].told == "terminal rows are immutable"
        assert lines["index"].level == "ok"
    assert all(word in blank.one(INDEX) for word in ("'doing'", "'todo'"))
    blank.do("INSERT INTO jobs SELECT n, 'failed', 'w', now() FROM generate_series(1, 2) AS n")
    blank.do("UPDATE jobs SET created_at = now()")
    assert refused(blank, "UPDATE jobs SET status = 'doing' WHERE id = 1")
    assert refused(blank, "UPDATE jobs SET worker_id = NULL WHERE id = 1"), "one of them names it"
    blank.do("INSERT INTO jobs VALUES (3, 'expired', 'w', now())")
    assert refused(blank, "DELETE FROM jobs WHERE id = 3")


async def test_one_that_does_not_ask_for_the_trigger_leaves_it_to_the_other(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank.do(JOBS)
    held, _, waiting = TWO.rpartition("truth_trigger = true\n")
    configure(tmp_path, monkeypatch, held + waiting, "held")
    migrate(find_target("held"))
    assert migrate(find_target("waiting")).done == ()
    lines = {line.about: line for line in await examine(find_target("waiting"))}
    assert lines["truth trigger"].told == "terminal rows are immutable"
    blank.do("INSERT INTO jobs VALUES (1, 'failed', 'w', now()), (2, 'expired', 'w', now())")
    assert refused(blank, "UPDATE jobs SET status = 'doing' WHERE id = 1")
    assert not refused(blank, "UPDATE jobs SET status = 'todo' WHERE id = 2")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('["todo"]', '["todo", "failed"]', "'held' and 'waiting' .* 'failed' is terminal by the"),
        ("worker_id = false", "worker_id = 'status_of'", "mean other columns by worker_id"),
        ("worker_id = false", "id = ['id', 'status_of']", "mean other columns by id"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_made(
    blank: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
    told: str,
) -> None:
    blank.do(JOBS)
    blank.do("ALTER TABLE jobs ADD status_of text NOT NULL, ADD UNIQUE (id, status_of)")
    configure(tmp_path, monkeypatch, TWO.replace(before, after), "held")
    for target in load_targets().values():
        with pytest.raises(ConfigurationError, match=told):
            migrate(target)
    assert blank.one("SELECT to_regnamespace('orphan_recovery')") is None


def test_a_table_of_that_name_in_another_database_is_another(
    server: str, blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database_of_its_own(server) as url:
        monkeypatch.setenv("OTHER_URL", url)
        toml = TWO.replace("[targets.waiting]", '[targets.waiting]\ndatabase_url_env = "OTHER_URL"')
        configure(tmp_path, monkeypatch, toml, "held")
        blank.do(JOBS)
        migrate(find_target("held"))
    assert "'todo'" not in blank.one(INDEX)


# The role


MANY = """
[targets.first]
table = "jobs"
in_flight = ["doing"]
crashed = "failed"
[targets.second]
table = "public.jobs"
in_flight = ["todo"]
crashed = "failed"
release = ["slot"]
[targets.steps]
table = "steps"
in_flight = ["doing"]
crashed = "failed"
[targets.steps.worker_heartbeat]
table = "jobs"
key = "id"
run_key = "job"
last_seen = "created_at"
[targets.steps.run_events]
table = "jobs"
key = "slot"
run_key = "job"
last_seen = "created_at"
"""
IN_SCHEMAS = """
CREATE SCHEMA words;;
CREATE TYPE words.state AS ENUM ('todo', 'doing', 'failed');;
CREATE TABLE jobs (id int PRIMARY KEY, status words.state NOT NULL, slot int,
    created_at timestamptz NOT NULL);;
CREATE TABLE steps (id int PRIMARY KEY, status text NOT NULL, job int, created_at timestamptz);;
INSERT INTO jobs VALUES (1, 'doing', 1, now() - interval '2 hours'),
    (2, 'todo', 2, now() - interval '2 hours');;
INSERT INTO steps VALUES (1, 'doing', 1, now() - interval '2 hours')
"""


@pytest.mark.parametrize("last", ["first", "second", "steps"])
async def test_one_role_sweeps_targets_that_share_tables_whichever_was_printed_last(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Its enum is in a schema of its own, too."""
    make(blank, IN_SCHEMAS)
    configure(tmp_path, monkeypatch, MANY, "first")
    with a_role(blank) as name:
        for printed_for in ("first", "second", "steps", last):
            psql(blank, printed(blank, find_target(printed_for), name))
        with seen_by(blank, name) as seen:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", seen.url)
            for target in load_targets().values():
                report = await sweep(target)
                assert (report.error, report.recovered) == (None, 1), target.name
    rows = blank.do("SELECT id, status::text, slot FROM jobs ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [(1, "failed", 1), (2, "failed", None)]


async def test_a_table_of_beats_that_the_search_path_finds_may_be_read(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(
        blank,
        "CREATE SCHEMA fleet;; CREATE TABLE fleet.workers (id text, at timestamptz);;"
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, worker_id text,"
        " created_at timestamptz);;"
        "INSERT INTO jobs VALUES (1, 'running', 'w', now() - interval '2 hours')",
    )
    database = psycopg.sql.Identifier(str(make_url(blank.url).database))
    path = psycopg.sql.SQL("ALTER DATABASE {} SET search_path = public, fleet").format(database)
    blank.do(path)  # type: ignore[arg-type]
    toml = (
        "[targets.jobs]\ntable = 'jobs'\n[targets.jobs.worker_heartbeat]\ntable = 'workers'\n"
        "key = 'id'\nrun_key = 'worker_id'\nlast_seen = 'at'\n"
    )
    target = configure(tmp_path, monkeypatch, toml, "jobs")
    with a_role(blank) as name:
        psql(blank, printed(blank, target, name))
        with seen_by(blank, name) as seen:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", seen.url)
            report = await sweep(target)
    assert (report.error, report.recovered) == (None, 1)
