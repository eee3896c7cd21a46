"""The schema: applied again and again, taken away again, and an existing table adopted."""

import re
import threading
from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from cli_support import run
from orphan_recovery import ConfigurationError, recover_orphaned_runs
from orphan_recovery.schema import migrate as schema
from orphan_recovery.schema.migrate import Migration, migrate, newest_revisions, unmigrate
from orphan_recovery.target import Target
from sql_support import a_role, seen_by
from support import Database, until
from tables_support import do, set_for_all

COLUMNS = {
    *("id", "tenant_id", "worker_id", "task", "input_json", "status", "success", "error"),
    *("output_json", "created_at", "started_at", "heartbeat_at", "completed_at"),
    *("parent_run_id", "attempt", "is_retry"),
}


def newest() -> str:
    return ", ".join(newest_revisions(Target()))


def columns(db: Database) -> dict[str, str]:
    rows = db.do(
        "SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute"
        " WHERE attrelid = 'worker_runs'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    return {row["attname"]: row["type"] for row in rows}


def shape(db: Database) -> list[dict[str, Any]]:
    """All that the schema consists of, as the catalogue has it."""
    return db.do(
        "SELECT 'column' AS kind, table_schema || '.' || table_name || '.' || column_name AS name,"
        " data_type || coalesce(column_default, '') AS definition FROM information_schema.columns"
        " WHERE table_schema IN ('public', 'orphan_recovery')"
        " UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes"
        " WHERE schemaname IN ('public', 'orphan_recovery')"
        " UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger"
        " WHERE NOT tgisinternal"
        " UNION ALL SELECT 'function', proname, prosrc FROM pg_proc"
        " WHERE pronamespace = 'orphan_recovery'::regnamespace ORDER BY 1, 2, 3"
    )


def test_the_schema_is_applied_once_and_again_without_harm(blank: Database) -> None:
    did = migrate()
    assert (did.before, did.after) == ("none", newest())
    first = shape(blank)
    assert set(columns(blank)) == COLUMNS
    assert migrate() == Migration(newest(), newest(), ())
    assert shape(blank) == first


@pytest.mark.parametrize("going", [migrate, unmigrate], ids=["up", "down"])
def test_what_a_newer_version_left_is_refused_by_name(
    blank: Database, going: Callable[[], Migration]
) -> None:
    migrate()
    first = shape(blank)
    blank.do(
        "UPDATE orphan_recovery.schema_version SET version_num = 'ledger_9999'"
        " WHERE version_num LIKE 'ledger%'"
    )
    with pytest.raises(ConfigurationError) as caught:
        going()
    assert str(caught.value) == (
        "the database is at revision ledger_9999, which this version does not know: it brings "
        f"{newest()}. A newer version of orphan-recovery was here: install that one again; "
        "nothing was changed"
    )
    assert shape(blank) == first


def test_up_down_up_comes_to_the_same_and_down_leaves_nothing(blank: Database) -> None:
    migrate()
    first = shape(blank)
    assert unmigrate().after == "none"
    assert (
        blank.one("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0
    )
    assert blank.one("SELECT to_regnamespace('orphan_recovery')") is None
    migrate()
    assert shape(blank) == first


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ("DROP INDEX worker_runs_in_flight", "an index that serves detection"),
        ("DROP INDEX worker_runs_crashed", "an index that serves the summary"),
        ("DROP TRIGGER prevent_worker_run_mutation ON worker_runs", "the truth trigger"),
        ("ALTER TABLE worker_runs DISABLE TRIGGER USER", "the truth trigger"),
    ],
)
def test_what_was_lost_is_made_again(blank: Database, lost: Any, found: str) -> None:
    migrate()
    first = shape(blank)
    blank.do(lost)
    [made] = migrate().done
    assert made.startswith(found)
    assert shape(blank) == first
    assert migrate().done == ()


async def test_down_destroys_neither_runs_nor_the_ledger(db: Database) -> None:
    db.add_run("run")
    await recover_orphaned_runs()
    with pytest.raises(ConfigurationError, match="ledger holds sweeps"):
        unmigrate()
    assert len(db.verdicts()) == 1
    assert db.status("run") == "crashed"


def own_indexes(db: Database) -> int:
    return int(
        db.one(
            "SELECT count(*) FROM pg_indexes WHERE indexname LIKE '%in_flight' OR indexname LIKE"
            " '%crashed'"
        )
    )


async def test_down_goes_on_once_the_owner_has_dropped_the_schema_as_it_said(db: Database) -> None:
    db.add_run("run")
    await recover_orphaned_runs()
    with pytest.raises(ConfigurationError, match="run this again, for what is left") as refused:
        unmigrate()
    [drop] = re.findall("DROP SCHEMA .* CASCADE", str(refused.value))
    do(db, sql.SQL(drop))
    assert own_indexes(db) == 2
    did = unmigrate()
    assert (did.before, did.after) == ("none", "none")
    assert did.done == ("drop index worker_runs_in_flight", "drop index worker_runs_crashed")
    assert (own_indexes(db), db.status("run")) == (0, "crashed")
    assert unmigrate().done == ()


async def test_down_takes_what_is_left_on_a_second_table_of_the_database(blank: Database) -> None:
    """The first one took the ledger for both."""
    first, second = (Target(name=name, table=name, terminal=("crashed",)) for name in ("a", "b"))
    for target in (first, second):
        table = sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, status text, created_at timestamptz)")
        do(blank, table.format(sql.Identifier(target.table)))
        migrate(target)
    unmigrate(first)
    assert unmigrate(second).done == ("drop index b_in_flight",)
    assert own_indexes(blank) == 0


@pytest.mark.parametrize(
    "target", [Target(), Target(name="mine", table="mine")], ids=["own", "any"]
)
def test_down_where_there_is_no_table_has_nothing_to_do(blank: Database, target: Target) -> None:
    assert unmigrate(target) == Migration("none", "none", ())


def test_down_leaves_a_table_with_rows(db: Database) -> None:
    db.add_run("run", status="completed")
    unmigrate()
    assert db.statuses() == {"run": "completed"}
    db.do("UPDATE worker_runs SET status = 'failed'")  # the trigger is gone


async def test_an_existing_table_is_adopted_and_nothing_in_it_is_rewritten(
    blank: Database,
) -> None:
    blank.do(
        "CREATE TYPE run_status AS ENUM"
        " ('queued', 'running', 'completed', 'failed', 'crashed', 'paused')"
    )
    blank.do(
        "CREATE TABLE worker_runs (id uuid PRIMARY KEY, status run_status NOT NULL,"
        " worker_id text, payload text, created_at timestamp, started_at timestamp)"
    )
    blank.do(
        "INSERT INTO worker_runs SELECT gen_random_uuid(), 'running', 'w', 'mine',"
        " (now() AT TIME ZONE 'UTC') - interval '2 hours' FROM generate_series(1, 3)"
    )
    before = blank.do("SELECT id, status, worker_id, payload, created_at FROM worker_runs")
    file = blank.one("SELECT pg_relation_filenode('worker_runs')")
    migrate()
    assert blank.one("SELECT pg_relation_filenode('worker_runs')") == file, "it was rewritten"
    assert blank.do("SELECT id, status, worker_id, payload, created_at FROM worker_runs") == before
    kinds = columns(blank)
    assert set(kinds) == COLUMNS | {"payload"}
    assert kinds["created_at"] == "timestamp without time zone"
    assert kinds["parent_run_id"] == "uuid", "it points to the table's own key"
    blank.do("INSERT INTO worker_runs (id, status) VALUES (gen_random_uuid(), 'paused')")
    report = await recover_orphaned_runs()
    assert (report["recovered"], report["error"]) == (3, None)
    with pytest.raises(ConfigurationError, match="ledger"):
        unmigrate()


def test_a_missing_created_at_is_added_for_new_rows_and_not_made_up_for_old_ones(
    blank: Database,
) -> None:
    blank.do("CREATE TABLE worker_runs (id text PRIMARY KEY, status text)")
    blank.do("INSERT INTO worker_runs VALUES ('old', 'running')")
    migrate()
    blank.do("INSERT INTO worker_runs VALUES ('new', 'running')")
    rows = blank.do("SELECT id, created_at IS NULL AS unknown FROM worker_runs ORDER BY id")
    assert rows == [{"id": "new", "unknown": False}, {"id": "old", "unknown": True}]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("CREATE TABLE worker_runs (run_id text, status text)", "no column id"),
        ("CREATE TABLE worker_runs (id text, state text)", "no column status"),
        ("CREATE VIEW worker_runs AS SELECT 'x' AS id, 'y' AS status", "not an ordinary table"),
        ("CREATE TABLE worker_runs (id text, status text)", "ADD PRIMARY KEY"),
        ("CREATE TABLE worker_runs (id text UNIQUE, status text)", "ADD PRIMARY KEY"),
        (
            "CREATE TABLE worker_runs (id text PRIMARY KEY, status text, created_at bigint)",
            "created_at: column 'created_at' .* is bigint: a time must be",
        ),
        (
            "CREATE TABLE worker_runs (id text PRIMARY KEY, status text);"
            "CREATE VIEW worker_runs_in_flight AS SELECT FROM worker_runs",
            "needs an index 'worker_runs_in_flight', but schema 'public' has another view",
        ),
        (
            "CREATE TYPE s AS ENUM ('queued', 'running', 'done');"
            "CREATE TABLE worker_runs (id text PRIMARY KEY, status s)",
            "ALTER TYPE s ADD VALUE 'crashed'",
        ),
    ],
)
def test_what_cannot_be_adopted_is_refused_with_the_way_out_and_left_as_it_was(
    blank: Database, table: Any, message: str
) -> None:
    blank.do(table)
    before = columns(blank)
    with pytest.raises(ConfigurationError, match=message):
        migrate()
    assert columns(blank) == before
    assert blank.one("SELECT to_regclass('orphan_recovery.sweeps')") is None


def test_a_busy_table_makes_the_migration_give_up_and_not_the_queries_wait(
    blank: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_TIMEOUT_MS", 100)
    blank.do("CREATE TABLE worker_runs (id text PRIMARY KEY, status text)")
    with blank.connect() as busy:
        busy.execute("SELECT * FROM worker_runs")
        with pytest.raises(ConfigurationError, match="lock on the runs table"):
            migrate()
    assert set(columns(blank)) == {"id", "status"}
    migrate()
    assert set(columns(blank)) == COLUMNS


@pytest.mark.parametrize("lacking", ["CREATE SCHEMA", "the table", "all"])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_a_role_that_lacks_a_right_is_told_whose_the_migration_is(
    blank: Database, monkeypatch: pytest.MonkeyPatch, lacking: str, down: bool
) -> None:
    if lacking != "CREATE SCHEMA":
        migrate()
    with a_role(blank, "plain") as name:
        who = sql.Identifier(name)
        do(blank, sql.SQL("CREATE ROLE {} LOGIN").format(who))
        if lacking == "the table":
            do(blank, sql.SQL("GRANT USAGE ON SCHEMA orphan_recovery TO {}").format(who))
            every = sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA orphan_recovery TO {}").format(who)
            do(blank, every)
            blank.do("DROP INDEX worker_runs_crashed")
        before = shape(blank) if lacking != "CREATE SCHEMA" else []
        with seen_by(blank, name) as seen:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", seen.url)
            if down and lacking == "CREATE SCHEMA":
                assert unmigrate() == Migration("none", "none", ())
                return
            done = run("migrate", *(["--down"] if down else []))
    assert (done.returncode, done.stdout) == (2, "")
    assert "(SQLSTATE 42501): run it as the owner of the tables, with the right to" in done.stderr
    assert "orphan-recovery sql" not in done.stderr
    if before:
        assert shape(blank) == before


def test_ten_containers_that_migrate_at_once_get_one_schema(blank: Database) -> None:
    results: list[object] = []

    def one() -> None:
        try:
            results.append(migrate().after)
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [newest()] * 10


def test_an_interrupted_index_build_is_repeated(blank: Database) -> None:
    migrate()
    blank.do("DROP INDEX worker_runs_in_flight")
    blank.do("INSERT INTO worker_runs (id) VALUES ('a')")
    blank.do(
        "CREATE FUNCTION fails(text) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'build fails'; END $$"
    )
    with pytest.raises(psycopg.errors.RaiseException):
        blank.do("CREATE INDEX CONCURRENTLY worker_runs_in_flight ON worker_runs (fails(id))")
    invalid = (
        "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = 'worker_runs_in_flight'::regclass"
    )
    assert blank.one(invalid) is True
    migrate()
    assert blank.one(invalid) is False
    name = blank.one("SELECT obj_description('worker_runs_in_flight'::regclass, 'pg_class')")
    assert name.startswith("orphan-recovery "), "else it would pass for one made by hand"
    assert migrate().done == ()


def test_time_outs_of_the_database_end_no_index_build(db: Database) -> None:
    db.do("DROP INDEX worker_runs_in_flight")
    results: list[object] = []

    def build() -> None:
        try:
            results.append(migrate().done)
        except Exception as error:
            results.append(error)

    with db.connect() as busy:
        busy.execute("INSERT INTO worker_runs (id) VALUES ('new')")
        set_for_all(db, "statement_timeout = '200ms'")
        if db.one("SELECT current_setting('server_version_num')::int") >= 170_000:
            set_for_all(db, "transaction_timeout = '200ms'")
        thread = threading.Thread(target=build)
        thread.start()
        waits: LiteralString = (
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock' AND clock_timestamp() - query_start > '0.4 s')"
        )
        until(lambda: db.one(waits) or not thread.is_alive(), "a wait longer than the time-outs")
    thread.join()
    assert results == [("an index that serves detection: worker_runs_in_flight",)]


@pytest.mark.parametrize("command", ["migrate", "sql"])
def test_a_role_that_has_another_encoding_reads_the_catalogue_all_the_same(
    blank: Database, command: str
) -> None:
    set_for_all(blank, "client_encoding = 'SQL_ASCII'")
    blank.do("CREATE TABLE worker_runs (id text PRIMARY KEY, status text)")
    done = run(command, ORPHAN_RECOVERY_DATABASE_URL=blank.url)
    assert (done.returncode, done.stderr) == (0, "")
