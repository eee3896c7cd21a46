"""The script that `orphan-recovery sql` prints: it is `migrate`, for a DBA, and a role.

It is run by psql as the owner of the tables, as it tells in its first lines.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from cli_support import run
from orphan_recovery import get_crash_recovery_summary, recover_orphaned_runs
from orphan_recovery.catalog import look_up
from orphan_recovery.database import database_url
from orphan_recovery.doctor.examine import examine
from orphan_recovery.doctor.finding import Level
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Columns, Elsewhere, Target
from sql_support import a_role, make, printed, psql, seen_by
from support import Database, database_of_its_own


def shape(db: Database) -> list[dict[str, Any]]:
    """All that the schemas of a database consist of, but for who may use them."""
    return db.do(
        "WITH own AS (SELECT oid, nspname FROM pg_namespace"
        "  WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'),"
        " relation AS (SELECT c.oid, n.nspname || '.' || c.relname AS name, c.relkind::text"
        "  FROM pg_class c JOIN own n ON n.oid = c.relnamespace)"
        " SELECT 'relation' AS kind, name, relkind AS definition FROM relation"
        " UNION ALL SELECT 'comment', name, obj_description(oid, 'pg_class') FROM relation"
        " UNION ALL SELECT 'column', r.name || '.' || a.attname,"
        "  concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull,"
        "  pg_get_expr(d.adbin, d.adrelid)) FROM relation r JOIN pg_attribute a"
        "  ON a.attrelid = r.oid AND a.attnum > 0 LEFT JOIN pg_attrdef d"
        "  ON d.adrelid = r.oid AND d.adnum = a.attnum"
        " UNION ALL SELECT 'constraint', r.name || '.' || k.conname, pg_get_constraintdef(k.oid)"
        "  FROM relation r JOIN pg_constraint k ON k.conrelid = r.oid"
        " UNION ALL SELECT 'index', r.name, pg_get_indexdef(i.indexrelid) || i.indisvalid"
        "  FROM relation r JOIN pg_index i ON i.indexrelid = r.oid"
        " UNION ALL SELECT 'part', r.name, h.inhparent::regclass::text"
        "  FROM relation r JOIN pg_inherits h ON h.inhrelid = r.oid"
        " UNION ALL SELECT 'trigger', r.name || '.' || t.tgname,"
        "  pg_get_triggerdef(t.oid) || t.tgenabled::text FROM relation r"
        "  JOIN pg_trigger t ON t.tgrelid = r.oid AND NOT t.tgisinternal"
        " UNION ALL SELECT 'function', p.proname, pg_get_functiondef(p.oid)"
        "  FROM pg_proc p JOIN own n ON n.oid = p.pronamespace"
        " ORDER BY 1, 2, 3"
    )


def revisions(db: Database) -> list[dict[str, Any]]:
    return db.do("SELECT version_num FROM orphan_recovery.schema_version ORDER BY 1")


PLAIN = """
CREATE TABLE jobs (
    id bigint PRIMARY KEY, state text NOT NULL, owner text, inserted_at timestamptz NOT NULL
)
"""
PARTITIONED = """
CREATE TABLE jobs (
    id bigint, day date, state text NOT NULL, inserted_at timestamptz, PRIMARY KEY (id, day)
) PARTITION BY RANGE (day);;
CREATE TABLE jobs_old PARTITION OF jobs FOR VALUES FROM ('2000-01-01') TO ('2026-01-01')
    PARTITION BY HASH (id);;
CREATE TABLE jobs_old_0 PARTITION OF jobs_old FOR VALUES WITH (MODULUS 2, REMAINDER 0);;
CREATE TABLE jobs_old_1 PARTITION OF jobs_old FOR VALUES WITH (MODULUS 2, REMAINDER 1);;
CREATE TABLE jobs_new PARTITION OF jobs DEFAULT
"""
ODD_TABLE = 'my "jobs"\nDROP TABLE victim; -- :x $do$ \\ 100% größe'
ODD = """
CREATE SCHEMA "the.schema";;
CREATE TABLE victim (id int);;
CREATE TABLE "the.schema"."my ""jobs""
DROP TABLE victim; -- :x $do$ \\ 100% größe" (
    "the ""id"" :x" bigint PRIMARY KEY, "sta'tus %s" text NOT NULL, "wer\\" text,
    "crea$$ted" timestamptz NOT NULL, completed_at timestamptz
)
"""
OLD_DEFAULT = """
CREATE TYPE run_status AS ENUM ('queued', 'running', 'completed', 'failed', 'crashed');;
CREATE TABLE worker_runs (id uuid PRIMARY KEY, status run_status, created_at timestamp, more int)
"""

FOREIGN = Target(
    name="mine",
    table="public.jobs",
    in_flight=("run'ning", "claimed"),
    crashed="dead",
    terminal=("dead", 'do"ne'),
    columns=Columns(status="state", created_at="inserted_at"),
)
TARGETS = {
    "default": ("", Target()),
    "default, adopted": (OLD_DEFAULT, Target()),
    "foreign": (PLAIN, FOREIGN),
    "foreign, guarded": (PLAIN, FOREIGN.model_copy(update={"truth_trigger": True})),
    "foreign, no index": (PLAIN, FOREIGN.model_copy(update={"index": False})),
    "partitioned": (
        PARTITIONED,
        FOREIGN.model_copy(
            update={
                "truth_trigger": True,
                "columns": Columns(id=("id", "day"), status="state", created_at="inserted_at"),
            }
        ),
    ),
    "odd": (
        ODD,
        Target(
            name="odd",
            table='"the.schema"."' + ODD_TABLE.replace('"', '""') + '"',
            in_flight=("it's :x", "100% \\ $do$"),
            terminal=("crashed", '"; DROP TABLE victim; --'),
            truth_trigger=True,
            columns=Columns(
                id=('the "id" :x',),
                status="sta'tus %s",
                worker_id="wer\\",
                created_at="crea$$ted",
            ),
        ),
    ),
}


@pytest.mark.parametrize(("made", "target"), TARGETS.values(), ids=TARGETS)
def test_the_script_comes_to_the_same_as_migrate(
    server: str, blank: Database, made: str, target: Target
) -> None:
    with database_of_its_own(server) as url, Database(url) as migrated, a_role(blank) as role:
        if made:
            make(blank, made)
            make(migrated, made)
        migrate(target, database_url(url))
        before = shape(blank)
        script = printed(blank, target, role)
        assert shape(blank) == before, "printing executes nothing"
        assert blank.do("SELECT FROM pg_roles WHERE rolname = %s", role) == []

        psql(blank, script)
        assert shape(blank) == shape(migrated)
        assert revisions(blank) == revisions(migrated)
        assert migrate(target, database_url(blank.url)).done == ()

        # Printed again only the role is left, which may be run again and again.
        rest = printed(blank, target, role)
        assert set(statements(rest)) == {"BEGIN", "COMMIT", "DO", "REVOKE", "GRANT"}
        after, granted = shape(blank), columns_with_rights(blank)
        psql(blank, rest)
        psql(blank, rest)
        assert shape(blank) == after
        assert columns_with_rights(blank) == granted


def columns_with_rights(db: Database) -> list[dict[str, Any]]:
    """Where rights to single columns were given, and which."""
    return db.do(
        "SELECT attrelid::regclass::text AS of, attname, attacl::text FROM pg_attribute"
        " WHERE attacl IS NOT NULL AND attrelid >= 16384 ORDER BY 1, 2"
    )


def statements(script: str) -> list[str]:
    """The first word of each statement, without the comments and what stands in quotes."""
    bare = re.sub(r"^--.*$", "", script, flags=re.M)
    bare = re.sub(r"""'[^']*'|"[^"]*"|[$]do[$].*?[$]do[$]""", "x", bare, flags=re.S)
    return [statement.split()[0] for statement in bare.split(";") if statement.strip()]


def test_a_table_that_was_migrated_and_lost_its_ledger_gets_back_what_it_lacks(
    server: str, blank: Database
) -> None:
    with database_of_its_own(server) as url, Database(url) as migrated, a_role(blank) as role:
        migrate(Target(), database_url(url))
        migrate(Target(), database_url(blank.url))
        blank.do("DROP SCHEMA orphan_recovery CASCADE")
        blank.do("DROP INDEX worker_runs_crashed")
        psql(blank, printed(blank, Target(), role))
        assert shape(blank) == shape(migrated)
        assert revisions(blank) == revisions(migrated)


def test_the_command_prints_that_script(blank: Database, tmp_path: Path) -> None:
    with a_role(blank) as role:
        make(blank, PLAIN)
        file = tmp_path / "orphan-recovery.toml"
        file.write_text(
            "[targets.mine]\ntable = 'public.jobs'\nin_flight = [\"run'ning\", 'claimed']\n"
            "crashed = 'dead'\nterminal = ['dead', 'do\"ne']\n"
            "[targets.mine.columns]\nstatus = 'state'\ncreated_at = 'inserted_at'\n"
        )
        variables = {"ORPHAN_RECOVERY_CONFIG": str(file)}
        done = run("sql", "--target", "mine", "--role", role, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == printed(blank, FOREIGN, role) + "\n"
        told = run("sql", "--target", "mine", **variables).stdout
        assert '"orphan_recovery_sweep"' in told
        assert "and the function that a truth\n-- trigger calls, where there is one." in told
        assert 'orphan-recovery sql --target mine | psql -v ON_ERROR_STOP=1 "$OWNER_URL"' in told


@pytest.mark.parametrize(
    "name",
    [
        'o\'brien "x"',
        "a\\b :x %s",
        "x'; DROP TABLE worker_runs; --",
        'x"; DROP TABLE worker_runs; --',
        "x$do$; DROP TABLE worker_runs; --",
        "x\nDROP TABLE worker_runs; --",
    ],
)
def test_a_roles_name_is_a_name_whatever_is_in_it(db: Database, name: str) -> None:
    before = shape(db)
    with a_role(db, name) as role:
        script = printed(db, Target(), role)
        psql(db, script)
        psql(db, script)
        assert db.one("SELECT count(*) FROM pg_roles WHERE rolname = %s", role) == 1
        assert shape(db) == before


@pytest.fixture
def role(db: Database) -> Iterator[Database]:
    """The test's database, as the role that the script makes sees it."""
    with a_role(db) as name:
        script = printed(db, Target(), name)
        for _ in range(2):  # again and again without harm
            psql(db, script)
        with seen_by(db, name) as seen:
            yield seen


@pytest.mark.parametrize("place", [True, False], ids=["by place", "by key"])
async def test_the_role_can_do_all_that_a_sweep_does(
    db: Database, role: Database, monkeypatch: pytest.MonkeyPatch, place: bool
) -> None:
    """A role of before, which may not see where a row lies, as well."""
    sees_places = "SELECT has_column_privilege('worker_runs', 'ctid', 'SELECT')"
    assert role.one(sees_places)
    if not place:
        name = psycopg.sql.Identifier(role.one("SELECT current_user"))
        revoke = psycopg.sql.SQL("REVOKE SELECT (ctid) ON worker_runs FROM {}").format(name)
        db.do(revoke)  # type: ignore[arg-type]
    assert role.one(sees_places) is place
    engine = create_engine(database_url(role.url), poolclass=NullPool)
    with engine.connect() as connection:
        table = look_up(connection, None, "worker_runs")
    assert table is not None
    assert table.shows_places is place
    *orphans, poisoned = db.add_orphans(4)
    db.poison(poisoned)
    db.do(  # a sweep that was killed, for this one to close
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, opened_at) VALUES (gen_random_uuid(), 'default',"
        " 'worker_runs', 'test', 'test', '1 hour', '{}', '0', now() - interval '1 day')"
    )
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", role.url)
    report = await recover_orphaned_runs()
    assert (report["error"], report["recovered"], report["failed"]) == (None, 3, 1)
    assert db.statuses() == {**dict.fromkeys(orphans, "crashed"), poisoned: "running"}
    assert [sweep["ended_as"] for sweep in db.sweeps()] == ["died", "failed"]
    assert (await get_crash_recovery_summary())["total_crashed"] == 3
    findings = await examine(Target())
    assert [line for line in findings if line.level is Level.FAILURE] == []


REFUSED = [
    "DELETE FROM worker_runs",
    "TRUNCATE worker_runs",
    "INSERT INTO worker_runs (id) VALUES ('new')",
    "UPDATE worker_runs SET worker_id = 'me'",
    "UPDATE worker_runs SET heartbeat_at = now()",
    "UPDATE worker_runs SET output_json = '{}'",
    "SELECT input_json FROM worker_runs",
    "ALTER TABLE worker_runs DISABLE TRIGGER prevent_worker_run_mutation",
    "DROP TABLE worker_runs",
    "DELETE FROM orphan_recovery.verdicts",
    "UPDATE orphan_recovery.verdicts SET outcome = 'vanished'",
    "UPDATE orphan_recovery.sweeps SET asked_by = 'nobody'",
    "DELETE FROM orphan_recovery.sweeps",
    "UPDATE orphan_recovery.sweeps SET opened_at = now()",
    "DELETE FROM orphan_recovery.contests",
    "DELETE FROM orphan_recovery.holds",
    "UPDATE orphan_recovery.approvals SET hold_id = NULL",
    "UPDATE orphan_recovery.schema_version SET version_num = 'none'",
    "CREATE TABLE orphan_recovery.mine ()",
]


@pytest.mark.parametrize("statement", REFUSED)
def test_the_role_can_do_nothing_else(role: Database, statement: str) -> None:
    # The refusal comes before any row is looked at, so an empty table will do.
    with (
        role.connect(autocommit=True) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())


def test_a_role_that_was_given_more_is_cut_back(db: Database) -> None:
    with a_role(db) as name:
        script = printed(db, Target(), name)
        psql(db, script)
        with db.connect(autocommit=True) as owner:
            for more in (
                "ALL ON worker_runs",
                "SELECT (input_json) ON worker_runs",
                "ALL ON ALL TABLES IN SCHEMA orphan_recovery",
                "CREATE ON SCHEMA orphan_recovery",
            ):
                grant = psycopg.sql.SQL(f"GRANT {more} TO {{}}")
                owner.execute(grant.format(psycopg.sql.Identifier(name)))
        psql(db, script)
        with seen_by(db, name) as seen:
            for statement in REFUSED:
                with (
                    seen.connect(autocommit=True) as connection,
                    pytest.raises(psycopg.errors.InsufficientPrivilege),
                ):
                    connection.execute(statement.encode())


def test_the_role_may_connect_where_not_everybody_may(db: Database) -> None:
    name = psycopg.sql.Identifier(str(make_url(db.url).database))
    revoke = psycopg.sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(name)
    db.do(revoke)  # type: ignore[arg-type]
    with a_role(db) as role:
        psql(db, printed(db, Target(), role))
        with seen_by(db, role) as seen:
            assert seen.one("SELECT count(*) FROM orphan_recovery.sweeps") == 0


FLEET = """
CREATE SCHEMA fleet;;
CREATE TABLE fleet.workers (name text PRIMARY KEY, seen timestamptz, address text);;
CREATE TABLE events (job int, at timestamptz, body text);;
CREATE TABLE jobs (
    id int PRIMARY KEY, state text NOT NULL, owner text, slot int, queued_at timestamptz,
    error text, payload text
);;
INSERT INTO fleet.workers VALUES ('dead', now() - interval '1 hour'), ('alive', now());;
INSERT INTO events VALUES (3, now());;
INSERT INTO jobs
SELECT id, state, owner, id, now() - interval '2 hours'
FROM (VALUES (1, 'running', 'dead'), (2, 'running', 'alive'), (3, 'running', 'dead'),
             (4, 'done', 'dead')) AS job (id, state, owner)
"""
MAPPED = Target(
    name="fleet",
    table="jobs",
    in_flight=("running",),
    crashed="failed",
    terminal=("failed", "done"),
    columns=Columns(status="state", worker_id="owner", created_at="queued_at"),
    worker_heartbeat=Elsewhere(
        table="fleet.workers", key="name", run_key="owner", last_seen="seen"
    ),
    run_events=Elsewhere(table="events", key="job", run_key="id", last_seen="at"),
    release=("slot",),
)


@pytest.fixture
def fleet(blank: Database) -> Iterator[Database]:
    """A database with a mapped target, as the role that the script makes sees it."""
    make(blank, FLEET)
    with a_role(blank) as name:
        psql(blank, printed(blank, MAPPED, name))
        with seen_by(blank, name) as seen:
            yield seen


async def test_the_role_sweeps_a_mapped_table_with_its_workers_and_events(
    blank: Database, fleet: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", fleet.url)
    findings = await examine(MAPPED)
    assert [line for line in findings if line.level is Level.FAILURE] == []
    report = await run_sweep(SweepRequest(asked_by="test", target=MAPPED))
    assert (report.error, report.detected, report.recovered) == (None, 1, 1)
    rows = blank.do("SELECT id, state, owner, slot FROM jobs ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [
        (1, "failed", "dead", None),
        (2, "running", "alive", 2),
        (3, "running", "dead", 3),
        (4, "done", "dead", 4),
    ]


def test_of_a_mapped_table_the_role_can_do_nothing_else(fleet: Database) -> None:
    for statement in (
        "SELECT payload FROM jobs",
        "UPDATE jobs SET owner = 'me'",
        "INSERT INTO jobs (id, state) VALUES (9, 'running')",
        "DELETE FROM jobs",
        "SELECT address FROM fleet.workers",
        "UPDATE fleet.workers SET seen = now()",
        "DELETE FROM fleet.workers",
        "SELECT body FROM events",
        "INSERT INTO events VALUES (1, now())",
        "CREATE TABLE fleet.mine ()",
        "DELETE FROM orphan_recovery.verdicts",
    ):
        with (
            fleet.connect(autocommit=True) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute(statement.encode())


async def test_one_role_may_sweep_two_targets_of_one_database(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(db, FLEET)
    orphan = db.add_run("orphan")
    with a_role(db) as name:
        psql(db, printed(db, MAPPED, name))
        psql(db, printed(db, Target(), name))
        psql(db, printed(db, MAPPED, name))
        with seen_by(db, name) as seen:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", seen.url)
            for target in (MAPPED, Target()):
                report = await run_sweep(SweepRequest(asked_by="test", target=target))
                assert (report.error, report.recovered) == (None, 1)
    assert db.status(orphan) == "crashed"
