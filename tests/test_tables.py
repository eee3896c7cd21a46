"""Any runs table: hand-made schemas as real systems have them, swept by their description alone.

Nothing here is ours but the description: the keys, the words for a status, the types and the
names are another team's, and so are the rows that must stay as they are.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery import ConfigurationError, WorkerRun, mark_run_as_crashed
from orphan_recovery import migrate as schema
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.detect import detect, orphans
from orphan_recovery.doctor import explain
from orphan_recovery.ledger import note_direct_call
from orphan_recovery.mark import mark_one
from orphan_recovery.migrate import migrate, unmigrate
from orphan_recovery.request import DEFAULT_REASON, SweepRequest
from orphan_recovery.runs import runs_table
from orphan_recovery.summarize import summarize_target
from orphan_recovery.targets import Columns, Elsewhere, Rule, Target, find_target
from support import Database
from tables_support import Scene, configure, do, fleet, request, seen, set_for_all, sweep

# Rails: bigint keys, an integer for each status, naive times in UTC.
RAILS = Scene(
    ddl="""
    CREATE TABLE background_jobs (
        id bigserial PRIMARY KEY,
        job_class varchar NOT NULL,
        status integer NOT NULL DEFAULT 0 CHECK (status BETWEEN 0 AND 3),
        locked_by varchar,
        locked_at timestamp(6),
        last_error text,
        created_at timestamp(6) NOT NULL,
        updated_at timestamp(6) NOT NULL
    )""",
    runs="""
    INSERT INTO background_jobs (status, job_class, locked_by, created_at, locked_at, updated_at)
    SELECT s, 'ReportJob', by, t - created::interval, t - locked::interval, t - beat::interval
    FROM (SELECT timezone('UTC', now()) AS t) AS utc, (VALUES
        (1, 'host-1', '3 hours', '2 hours', '2 hours'),
        (1, 'host-1', '3 hours', '2 hours', '1 minute'),
        (1, 'host-2', '3 hours', '2 hours', '40 minutes'),
        (1, 'host-2', '2 minutes', '1 minute', '1 minute'),
        (0, NULL, '9 days', NULL, '9 days'),
        (2, 'host-1', '9 days', '9 days', '9 days'),
        (3, 'host-1', '9 days', '9 days', '9 days')
    ) AS v (s, by, created, locked, beat)""",
    table="background_jobs",
    setting="timezone = 'Asia/Tokyo'",
    toml="""
    [targets.scene]
    table = "background_jobs"
    heartbeat_seconds = 0.1
    in_flight = [1]
    waiting = [0]
    terminal = [2, 3]
    crashed = 3

    [targets.scene.columns]
    task = "job_class"
    worker_id = "locked_by"
    started_at = "locked_at"
    heartbeat_at = "updated_at"
    error = "last_error"
    """,
    orphans={"1": "run heartbeat", "3": "run heartbeat"},
)

# Django: uuid keys, a checked text, errors as JSON.
DJANGO = Scene(
    ddl="""
    CREATE TABLE tasks_taskresult (
        id uuid PRIMARY KEY,
        status varchar(12) NOT NULL CONSTRAINT tasks_status
            CHECK (status IN ('PENDING', 'STARTED', 'RETRY', 'SUCCESS', 'FAILURE', 'LOST')),
        task_name varchar(255),
        worker varchar(100),
        traceback jsonb,
        created timestamptz NOT NULL,
        date_started timestamptz,
        date_done timestamptz
    )""",
    runs="""
    INSERT INTO tasks_taskresult (id, status, worker, created, date_started, date_done)
    SELECT id::uuid, s, by, now() - made::interval, now() - begun::interval, now() - done::interval
    FROM (VALUES
        ('00000000-0000-0000-0000-00000000000a', 'STARTED', 'w1', '2 hours', '1 hour', NULL),
        ('00000000-0000-0000-0000-00000000000b', 'RETRY', NULL, '2 hours', NULL, NULL),
        ('00000000-0000-0000-0000-00000000000c', 'STARTED', 'w1', '2 hours', '2 minutes', NULL),
        ('00000000-0000-0000-0000-00000000000d', 'PENDING', NULL, '9 days', NULL, NULL),
        ('00000000-0000-0000-0000-00000000000e', 'SUCCESS', 'w1', '9 days', '9 days', '8 days'),
        ('00000000-0000-0000-0000-00000000000f', 'FAILURE', 'w1', '9 days', '9 days', '8 days')
    ) AS v (id, s, by, made, begun, done)""",
    table="tasks_taskresult",
    target=Target(
        name="django",
        table="public.tasks_taskresult",
        in_flight=("STARTED", "RETRY"),
        waiting=("PENDING",),
        terminal=("SUCCESS", "FAILURE", "LOST"),
        crashed="LOST",
        columns=Columns(
            task="task_name",
            worker_id="worker",
            error="traceback",
            created_at="created",
            started_at="date_started",
            completed_at="date_done",
        ),
    ),
    orphans={
        "00000000-0000-0000-0000-00000000000a": "age",
        "00000000-0000-0000-0000-00000000000b": "age",
    },
)

# Prisma: mixed case, reserved words, an enum of another schema, naive milliseconds beside zones.
PRISMA = Scene(
    ddl="""
    CREATE SCHEMA "app.""v2"" beta";
    CREATE SCHEMA "Types";
    CREATE TYPE "Types"."JobStatus" AS ENUM ('WAITING', 'ACTIVE', 'DONE', 'FAILED', 'Crashed!');
    CREATE TABLE "app.""v2"" beta"."Job" (
        "id" text PRIMARY KEY,
        "order" bigint,
        "user" text,
        "select" "Types"."JobStatus" NOT NULL DEFAULT 'WAITING',
        "group" text,
        "createdAt" timestamp(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
        "startedAt" timestamptz,
        "finishedAt" timestamp(3),
        "errorMessage" varchar(80)
    )""",
    runs="""
    INSERT INTO "app.""v2"" beta"."Job"
        ("id", "order", "user", "select", "group", "createdAt", "startedAt")
    SELECT id, 7, 'anna', s::"Types"."JobStatus", 'it''s w:1',
           timezone('UTC', now() - made::interval), now() - begun::interval
    FROM (VALUES
        ('cl%d "1"', 'ACTIVE', '2 hours', '1 hour'),
        ('cl:two', 'ACTIVE', '2 hours', NULL),
        ('cl(3)', 'ACTIVE', '2 hours', '2 minutes'),
        ('cl4', 'ACTIVE', '2 minutes', NULL),
        ('cl5', 'WAITING', '9 days', NULL),
        ('cl6', 'DONE', '9 days', '9 days'),
        ('cl7', 'FAILED', '9 days', '9 days')
    ) AS v (id, s, made, begun)""",
    table='"app.""v2"" beta"."Job"',
    key='"id"',
    status='"select"',
    setting="timezone = 'Asia/Tokyo'",
    toml="""
    [targets.scene]
    table = '"app.""v2"" beta"."Job"'
    in_flight = ["ACTIVE"]
    waiting = ["WAITING"]
    terminal = ["DONE", "FAILED", "Crashed!"]
    crashed = "Crashed!"

    [targets.scene.columns]
    status = "select"
    tenant_id = "order"
    task = "user"
    worker_id = "group"
    created_at = "createdAt"
    started_at = "startedAt"
    completed_at = "finishedAt"
    error = "errorMessage"
    """,
    orphans={'cl%d "1"': "age", "cl:two": "age"},
)

# A queue in Go: an enum, who tried it as an array, a condition on two columns at once.
GO = Scene(
    ddl="""
    CREATE TYPE job_state AS ENUM
        ('available', 'scheduled', 'running', 'completed', 'cancelled', 'discarded');
    CREATE TABLE job (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        state job_state NOT NULL DEFAULT 'available',
        kind text NOT NULL,
        attempt smallint NOT NULL DEFAULT 0,
        attempted_by text[],
        attempted_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        finalized_at timestamptz,
        errors jsonb[],
        CONSTRAINT finalized CHECK (
            (finalized_at IS NOT NULL) = (state IN ('completed', 'cancelled', 'discarded')))
    )""",
    runs="""
    INSERT INTO job (state, kind, attempt, attempted_by, created_at, attempted_at, finalized_at)
    SELECT s::job_state, 'send_email', 2, ARRAY['a', 'b {c}'], now() - made::interval,
           now() - begun::interval, now() - done::interval
    FROM (VALUES
        ('running', '2 hours', '1 hour', NULL),
        ('running', '2 hours', '1 minute', NULL),
        ('available', '9 days', NULL, NULL),
        ('scheduled', '9 days', NULL, NULL),
        ('completed', '9 days', '9 days', '8 days'),
        ('discarded', '9 days', '9 days', '8 days')
    ) AS v (s, made, begun, done)""",
    table="job",
    status="state",
    toml="""
    [targets.scene]
    table = "job"
    in_flight = ["running"]
    waiting = ["available", "scheduled"]
    terminal = ["completed", "cancelled", "discarded"]
    crashed = "discarded"

    [targets.scene.columns]
    status = "state"
    task = "kind"
    worker_id = "attempted_by"
    started_at = "attempted_at"
    completed_at = "finalized_at"
    """,
    orphans={"1": "age"},
)

# A key of three columns, a time among them, under a zone and a way of writing dates of its own.
COMPOSITE = Scene(
    ddl="""
    CREATE TABLE shard_runs (
        tenant uuid NOT NULL,
        shard integer NOT NULL,
        slot timestamptz NOT NULL,
        status text NOT NULL,
        created_at timestamptz NOT NULL,
        error text,
        PRIMARY KEY (slot, tenant, shard)
    )""",
    runs="""
    INSERT INTO shard_runs (tenant, shard, slot, status, created_at)
    SELECT 'aaaaaaaa-0000-0000-0000-000000000000', shard, slot::timestamptz, s,
           now() - made::interval
    FROM (VALUES
        (1, '2024-03-01 04:05:06.789+00', 'running', '2 hours'),
        (1, '2024-01-03 04:05:06.789+00', 'running', '1 minute'),
        (2, '2024-03-01 04:05:06.789+00', 'queued', '2 hours'),
        (3, '2024-03-01 04:05:06.789+00', 'completed', '9 days')
    ) AS v (shard, slot, s, made)""",
    table="shard_runs",
    key="""jsonb_build_array(
        shard::text, to_char(slot AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS'))::text""",
    setting="timezone = 'America/Los_Angeles'",
    target=Target(
        name="composite", table="shard_runs", columns=Columns(id=("tenant", "shard", "slot"))
    ),
    orphans={
        '["1", "2024-03-01T04:05:06.789"]': "age",
        '["2", "2024-03-01T04:05:06.789"]': "age",
    },
)

# Domains all over, in a schema that is not on the search path.
DOMAINS = Scene(
    ddl="""
    CREATE SCHEMA ops;
    CREATE DOMAIN ops.run_key AS uuid CHECK (VALUE IS NOT NULL);
    CREATE DOMAIN ops.state AS text CHECK (VALUE IN ('queued', 'running', 'done', 'crashed'));
    CREATE DOMAIN ops.state_again AS ops.state NOT NULL;
    CREATE DOMAIN ops.instant AS timestamp(3);
    CREATE DOMAIN ops.message AS varchar(60);
    CREATE TABLE ops.runs (
        id ops.run_key PRIMARY KEY,
        status ops.state_again,
        created_at ops.instant NOT NULL,
        completed_at ops.instant,
        error ops.message
    )""",
    runs="""
    INSERT INTO ops.runs (id, status, created_at)
    SELECT id::uuid, s, timezone('UTC', now() - made::interval)
    FROM (VALUES
        ('00000000-0000-0000-0000-00000000000a', 'running', '2 hours'),
        ('00000000-0000-0000-0000-00000000000b', 'queued', '1 minute'),
        ('00000000-0000-0000-0000-00000000000c', 'done', '9 days')
    ) AS v (id, s, made)""",
    table="ops.runs",
    setting="timezone = 'Asia/Tokyo'",
    target=Target(name="domains", table="ops.runs", terminal=("done", "crashed")),
    orphans={"00000000-0000-0000-0000-00000000000a": "age"},
)

# As little as a table can have.
MINIMAL = Scene(
    ddl="CREATE TABLE r (id int PRIMARY KEY, status text, created_at timestamptz)",
    runs="""
    INSERT INTO r SELECT id, s, now() - made::interval FROM (VALUES
        (1, 'running', '2 hours'), (2, 'running', '1 minute'), (3, 'queued', '2 hours'),
        (4, 'completed', '9 days'), (5, NULL, '9 days'), (6, 'running', NULL)
    ) AS v (id, s, made)""",
    table="r",
    target=Target(name="minimal", table="r"),
    orphans={"1": "age", "3": "age"},
)

SCENES = {
    "rails": RAILS,
    "django": DJANGO,
    "prisma": PRISMA,
    "go": GO,
    "composite": COMPOSITE,
    "domains": DOMAINS,
    "minimal": MINIMAL,
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
async def test_exactly_the_dead_runs_of_a_table_are_marked_once(
    blank: Database, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = scene.make(blank, tmp_path, monkeypatch)
    assert migrate(target).done
    before, statuses = scene.rows(blank), scene.statuses(blank)

    report = await sweep(target)
    assert (report.error, report.failed) == (None, 0)
    assert (report.detected, report.recovered) == (len(scene.orphans), len(scene.orphans))
    after = scene.rows(blank)
    assert {run for run in before if after[run] != before[run]} == set(scene.orphans)
    crashed = dict.fromkeys(scene.orphans, target.crashed)
    assert scene.statuses(blank) == {**statuses, **crashed}
    evidence = [(v["outcome"], v["evidence"], v["target"]) for v in blank.verdicts()]
    assert sorted(evidence) == sorted(
        ("marked", evidence, target.name) for evidence in scene.orphans.values()
    )

    assert (await sweep(target)).detected == 0
    assert migrate(target).done == ()
    assert scene.rows(blank) == after


@pytest.mark.parametrize("setting", ["datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'"])
@pytest.mark.parametrize("scene", [RAILS, COMPOSITE], ids=["naive", "a time in the key"])
async def test_how_a_database_writes_its_times_is_nothing_to_a_sweep(
    blank: Database,
    scene: Scene,
    setting: LiteralString,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = scene.make(blank, tmp_path, monkeypatch)
    set_for_all(blank, setting)
    migrate(target)
    statuses = scene.statuses(blank)
    report = await sweep(target)
    assert (report.error, report.recovered) == (None, len(scene.orphans))
    crashed = dict.fromkeys(scene.orphans, target.crashed)
    assert scene.statuses(blank) == {**statuses, **crashed}


async def test_a_run_has_one_id_whatever_the_time_zone_of_who_looks(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two sweeps do not know each other's verdicts, and the ledger has no history."""
    target = COMPOSITE.make(blank, tmp_path, monkeypatch)
    ids = []
    for zone in ("timezone = 'Asia/Tokyo'", "timezone = 'America/New_York'"):
        set_for_all(blank, zone)
        ids.append([run.id for run in await seen(blank, target)])
    assert ids[0] == ids[1]


async def test_the_snapshot_and_the_ledger_call_things_by_their_roles(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = PRISMA.make(blank, tmp_path, monkeypatch)
    migrate(target)
    first, second = await seen(blank, target)
    assert (first.id, second.id) == ("cl:two", 'cl%d "1"')
    assert (first.status, first.worker_id) == ("ACTIVE", "it's w:1")
    assert (first.tenant_id, first.task, first.target) == ("7", "anna", "scene")
    assert (await sweep(target, tenant="7", worker="it's w:1", limit=1)).recovered == 1
    [verdict] = blank.verdicts()
    assert (verdict["run_id"], verdict["worker_id"]) == ("cl:two", "it's w:1")
    assert (verdict["tenant_id"], verdict["task"]) == ("7", "anna")
    assert verdict["sign_of_life"] == first.sign_of_life
    [opened] = blank.sweeps()
    assert opened["table_name"] == target.table


OURS = ("seen", "locked", "marked", "own", "other", "kept", "worker_heartbeat", "verdicts")


@pytest.mark.parametrize(
    ("table", "key"),
    [*((table, "id") for table in OURS)]
    + [("runs", key) for key in ("run_id", "reason", "rule", "threshold", "id_1", "vanished")],
)
async def test_no_name_of_theirs_is_mistaken_for_one_of_ours(
    blank: Database, engine: AsyncEngine, table: str, key: str
) -> None:
    names = {"table": sql.Identifier(table), "key": sql.Identifier(key)}
    do(
        blank,
        sql.SQL(
            "CREATE TABLE {table} ({key} int PRIMARY KEY, status text, created_at timestamptz);"
            "INSERT INTO {table} VALUES (1, 'running', now() - interval '2 hours'),"
            " (2, 'running', now())"
        ).format(**names),
    )
    target = Target(name="odd", table=table, columns=Columns(id=key))
    migrate(target)
    report = await sweep(target)
    assert [verdict.error for verdict in report.verdicts if verdict.error] == []
    assert blank.outcomes() == {"1": "marked"}

    do(blank, sql.SQL("UPDATE {table} SET created_at = '2020-01-01'").format(**names))
    asked = request(target)
    [run] = await look(engine, asked)
    do(blank, sql.SQL("UPDATE {table} SET status = 'completed'").format(**names))
    assert await outcome_of(engine, asked, run) == "finished_first"


async def test_a_naive_column_is_written_in_utc_too(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = PRISMA.make(blank, tmp_path, monkeypatch)
    migrate(target)
    assert (await sweep(target)).recovered == 2
    at = blank.do(
        'SELECT now() - "finishedAt" AT TIME ZONE \'UTC\' AS ago FROM "app.""v2"" beta"."Job"'
        " WHERE \"select\" = 'Crashed!'"
    )
    assert all(timedelta(0) < row["ago"] < timedelta(minutes=1) for row in at)
    [run, _] = (await summarize_target(target))["recent_crashes"]
    assert run["crashed_at"].endswith(("Z", "+00:00"))


# What the mark writes, and what it takes away.


def simple(blank: Database, *columns: LiteralString, **described: Any) -> Target:
    """A table ``jobs`` with one run that has been silent for two hours, and some columns more."""
    blank.do(
        "CREATE TABLE jobs (id text PRIMARY KEY, status text NOT NULL, worker_id text, task text,"
        " created_at timestamptz, heartbeat_at timestamptz)"
    )
    for column in columns:
        do(blank, sql.SQL("ALTER TABLE jobs ADD {}").format(sql.SQL(column)))
    add(blank, "run")
    target = Target(**{"name": "simple", "table": "jobs", **described})
    migrate(target)
    return target


def add(
    blank: Database,
    run: str,
    status: str = "running",
    *,
    task: str | None = None,
    worker: str | None = "worker-1",
    age: str = "2 hours",
) -> None:
    blank.do(
        "INSERT INTO jobs (id, status, worker_id, task, created_at)"
        " VALUES (%s, %s, %s, %s, now() - %s::interval)",
        *(run, status, worker, task, age),
    )


def statuses(blank: Database) -> dict[str, str]:
    return {row["id"]: row["status"] for row in blank.do("SELECT id, status FROM jobs")}


@pytest.mark.parametrize(
    ("kind", "room"),
    [("text", None), ("varchar", None), ("varchar(80)", 80), ("char(80)", 80)],
)
async def test_the_error_is_cut_to_what_the_column_holds(
    blank: Database, kind: LiteralString, room: int | None
) -> None:
    blank.do("CREATE DOMAIN message AS varchar(50)")
    target = simple(blank, f"error {kind}")
    reason = "\N{SNOWMAN} node lost, 100% of it: " + "x" * 200
    report = await sweep(target, reason=reason)
    assert (report.failed, report.recovered) == (0, 1)
    error = blank.one("SELECT error FROM jobs")
    assert error[:room].startswith(reason[:room])
    assert len(error) == room if room else error.endswith(str(report.request.sweep_id))
    assert blank.verdicts()[0]["reason"] == reason, "the ledger has all of it"


@pytest.mark.parametrize("kind", ["json", "jsonb"])
async def test_an_error_in_a_json_column_is_a_json_text_and_reads_as_plain_text(
    blank: Database, kind: LiteralString
) -> None:
    target = simple(blank, f"error {kind}", crashed="crashed")
    reason = 'said "no" \\ {"a": 1}'
    assert (await sweep(target, reason=reason)).recovered == 1
    assert blank.one("SELECT json_typeof(error::json) FROM jobs") == "string"
    told = blank.one("SELECT error #>> '{}' FROM jobs")
    assert told.startswith(f"{reason}; last sign of life ")
    [run] = (await summarize_target(target))["recent_crashes"]
    assert run["error"] == told


async def test_released_columns_are_emptied_and_the_ledger_keeps_who_held_the_run(
    blank: Database,
) -> None:
    target = simple(
        blank,
        "lock_token uuid DEFAULT gen_random_uuid()",
        'slot int DEFAULT 7, ADD "kept for 100%" int DEFAULT 8',
        release=("worker_id", "lock_token", "slot"),
    )
    assert (await sweep(target)).recovered == 1
    [row] = blank.do('SELECT worker_id, lock_token, slot, "kept for 100%" AS kept FROM jobs')
    assert list(row.values()) == [None, None, None, 8]
    [verdict] = blank.verdicts()
    assert (verdict["worker_id"], verdict["outcome"]) == ("worker-1", "marked")


async def test_where_a_crash_is_one_failure_of_many_only_marked_runs_are_summed_up(
    blank: Database,
) -> None:
    target = simple(
        blank,
        "error text",
        crashed="failed",
        terminal=("completed", "failed"),
        in_flight=("running",),
    )
    for number in range(12):
        add(blank, f"orphan {number:02}", age=f"{3 + number} hours")
        add(blank, f"ordinary {number}", "failed")
    assert (await sweep(target, limit=12)).recovered == 12
    assert (await sweep(target)).recovered == 1
    summary = await summarize_target(target)
    assert summary["total_crashed"] == 13
    newest = summary["recent_crashes"]
    assert len(newest) == 10
    assert newest[0]["run_id"] == "run"
    assert {run["run_id"] for run in newest[1:]} < {f"orphan {n:02}" for n in range(12)}
    assert newest[0]["worker_id"] == "worker-1"
    assert newest[0]["error"].startswith(DEFAULT_REASON)


async def test_another_target_of_the_same_table_has_a_summary_of_its_own(blank: Database) -> None:
    first = simple(blank, crashed="failed", in_flight=("running",))
    add(blank, "queued", "queued")
    second = first.model_copy(update={"name": "second", "in_flight": ("queued",)})
    assert (await sweep(first)).recovered == 1
    assert (await sweep(second)).recovered == 1
    told = [await summarize_target(target) for target in (first, second)]
    assert [t["total_crashed"] for t in told] == [1, 1]
    assert [t["recent_crashes"][0]["run_id"] for t in told] == ["run", "queued"]


# Signs of life that are kept elsewhere.

# The type of the run's worker, of the workers' key, and a key as both have it.
KEYS: dict[str, tuple[LiteralString, LiteralString, str]] = {
    "uuid": ("uuid", "uuid", "aaaaaaaa-0000-0000-0000-00000000000a"),
    "text": ("text", "text", "worker 100%"),
    "bigint": ("bigint", "bigint", "7"),
    "text for uuid": ("text", "uuid", "aaaaaaaa-0000-0000-0000-00000000000a"),
    "uuid for varchar": ("uuid", "varchar(40)", "aaaaaaaa-0000-0000-0000-00000000000a"),
    "text for bigint": ("text", "bigint", "7"),
    "int for bigint": ("int", "bigint", "7"),
    "varchar for text": ("varchar(20)", "text", "w"),
}


def workers(blank: Database, ours: LiteralString, theirs: LiteralString) -> Target:
    """A table of runs, and one of their workers: any number of rows for each, in naive time."""
    do(
        blank,
        sql.SQL(
            'CREATE TABLE runs (id int PRIMARY KEY, status text, "locked By" {ours},'
            " created_at timestamptz DEFAULT now() - interval '9 hours');"
            'CREATE TABLE "worker.pulse" ("which?" {theirs}, "when" timestamp)'
        ).format(ours=sql.SQL(ours), theirs=sql.SQL(theirs)),
    )
    target = Target(
        name="workers",
        table="runs",
        heartbeat_seconds=0.1,
        columns=Columns(worker_id="locked By"),
        worker_heartbeat=Elsewhere(
            table='"worker.pulse"', key="which?", run_key="locked By", last_seen="when"
        ),
    )
    migrate(target)
    return target


def run_of(blank: Database, number: int, worker: str | None, *beats: str) -> None:
    """A run, and its worker's beats, each so long ago."""
    blank.do(
        "INSERT INTO runs (id, status, \"locked By\") VALUES (%s, 'running', %s)", number, worker
    )
    for beat in beats:
        blank.do(
            "INSERT INTO \"worker.pulse\" VALUES (%s, timezone('UTC', now() - %s::interval))",
            *(worker, beat),
        )


@pytest.mark.parametrize("key", KEYS)
async def test_a_worker_that_beats_keeps_its_runs_alive_whatever_its_key(
    blank: Database, key: str
) -> None:
    ours, theirs, worker = KEYS[key]
    target = workers(blank, ours, theirs)
    set_for_all(blank, "timezone = 'Asia/Tokyo'")
    run_of(blank, 1, worker, "5 hours", "1 minute", "3 hours")
    assert await seen(blank, target) == []
    blank.do(
        "DELETE FROM \"worker.pulse\" WHERE \"when\" > timezone('UTC', now() - interval '1 h')"
    )
    [run] = await seen(blank, target)
    assert run.evidence == "worker heartbeat"
    assert run.worker_seen_at == run.sign_of_life
    assert timedelta(hours=3) <= run.silence < timedelta(hours=3, minutes=1), "the latest counts"
    assert (await sweep(target)).recovered == 1
    assert blank.verdicts()[0]["worker_id"] == worker


async def test_a_run_without_a_worker_or_whose_workers_row_is_gone_has_its_own_age(
    blank: Database,
) -> None:
    target = workers(blank, "text", "text")
    run_of(blank, 1, None)
    run_of(blank, 2, "gone")
    run_of(blank, 3, "alive", "1 minute")
    blank.do('INSERT INTO "worker.pulse" VALUES (NULL, now())')
    report = await sweep(target)
    assert report.recovered == 2
    assert {v["run_id"]: v["evidence"] for v in blank.verdicts()} == {"1": "age", "2": "age"}


async def test_a_worker_that_never_beat_or_beat_at_infinity_is_no_error(blank: Database) -> None:
    target = workers(blank, "text", "text")
    run_of(blank, 1, "never")
    blank.do("INSERT INTO \"worker.pulse\" VALUES ('never', NULL), ('never', '-infinity')")
    run_of(blank, 2, "for ever")
    blank.do("INSERT INTO \"worker.pulse\" VALUES ('for ever', 'infinity')")
    assert [run.id for run in await seen(blank, target)] == ["1"]
    assert (await fleet(blank, target)).ahead == 1


async def test_a_view_may_tell_of_workers_and_another_schemas_table_may_have_the_runs_name(
    blank: Database,
) -> None:
    target = workers(blank, "text", "text")
    run_of(blank, 1, "dead", "2 hours")
    run_of(blank, 2, "alive", "1 minute")
    blank.do(
        'CREATE SCHEMA ops; CREATE VIEW ops.runs AS SELECT "which?" AS id, "which?" AS "locked By",'
        ' "when" FROM "worker.pulse"'
    )
    told = Elsewhere(table="ops.runs", key="id", run_key="locked By", last_seen="when")
    for table in ("runs", "public.runs"):
        renamed = target.model_copy(update={"worker_heartbeat": told, "table": table})
        assert [run.id for run in await seen(blank, renamed)] == ["1"]


async def test_the_events_of_a_run_are_signs_of_its_life(blank: Database) -> None:
    blank.do(
        "CREATE TABLE runs (id bigint PRIMARY KEY, status text, created_at timestamptz);"
        "CREATE TABLE run_events (id serial PRIMARY KEY, run text, at timestamptz);"
        "INSERT INTO runs SELECT n, 'running', now() - interval '9 hours'"
        " FROM generate_series(1, 3) AS n;"
        "INSERT INTO run_events (run, at) VALUES ('1', now() - interval '3 hours'),"
        " ('1', now() - interval '1 minute'), ('2', now() - interval '3 hours')"
    )
    target = Target(
        name="events",
        table="runs",
        heartbeat_seconds=0.1,
        run_events=Elsewhere(table="run_events", key="run", run_key="id", last_seen="at"),
    )
    migrate(target)
    runs = {run.id: run.silence // timedelta(hours=1) for run in await seen(blank, target)}
    assert runs == {"2": 3, "3": 9}
    assert (await sweep(target)).recovered == 2
    assert {v["run_id"] for v in blank.verdicts()} == {"2", "3"}


async def test_run_and_worker_and_events_all_count_and_the_latest_wins(blank: Database) -> None:
    target = workers(blank, "text", "text")
    blank.do("CREATE TABLE log (run int, at timestamptz)")
    heard = Elsewhere(table="log", key="run", run_key="id", last_seen="at")
    target = target.model_copy(update={"run_events": heard})
    for number, beat, event in ((1, "2 hours", "3 hours"), (2, "3 hours", "2 hours")):
        run_of(blank, number, f"w{number}", beat)
        blank.do("INSERT INTO log VALUES (%s, now() - %s::interval)", number, event)
    run_of(blank, 3, "w3", "3 hours")
    blank.do("INSERT INTO log VALUES (3, now() - interval '1 minute')")
    runs = await seen(blank, target)
    assert {run.id for run in runs} == {"1", "2"}
    assert all(run.silence < timedelta(hours=2, minutes=1) for run in runs)


@pytest.fixture
async def engine(blank: Database) -> AsyncIterator[AsyncEngine]:
    """On the blank database: an engine of a caller's."""
    engine = make_engine(database_url(blank.url))
    yield engine
    await engine.dispose()


async def look(engine: AsyncEngine, asked: SweepRequest) -> list[WorkerRun]:
    async with AsyncSession(engine) as session:
        return await detect(await session.connection(), asked)


async def outcome_of(engine: AsyncEngine, asked: SweepRequest, run: WorkerRun) -> str:
    """Mark one run in a transaction of its own, as a sweep does, and say what became of it."""
    async with AsyncSession(engine) as session, session.begin():
        await note_direct_call(session, asked)
        return (await mark_one(session, asked, run)).outcome


@pytest.mark.parametrize(
    "held",
    ["SELECT 1 FROM runs FOR UPDATE", 'UPDATE runs SET "locked By" = "locked By"'],
    ids=["locks", "writes"],
)
async def test_a_worker_that_beats_while_the_mark_waits_for_its_run_is_left_alone(
    blank: Database, engine: AsyncEngine, held: LiteralString
) -> None:
    target = workers(blank, "text", "text")
    run_of(blank, 1, "slow", "2 hours")
    asked = request(target)
    [run] = await look(engine, asked)
    with blank.connect() as worker:
        worker.execute(held)
        worker.execute("INSERT INTO \"worker.pulse\" VALUES ('slow', timezone('UTC', now()))")
        mark = asyncio.ensure_future(outcome_of(engine, asked, run))
        await asyncio.to_thread(blank.await_lock_wait)
        worker.commit()
        assert await mark == "sign_of_life"
    assert blank.one("SELECT status FROM runs") == "running"
    assert blank.outcomes() == {"1": "sign_of_life"}


async def test_a_worker_that_beats_while_a_whole_sweep_waits_for_its_run_is_left_alone(
    blank: Database,
) -> None:
    target = workers(blank, "text", "text")
    run_of(blank, 1, "slow", "2 hours")
    run_of(blank, 2, "dead", "2 hours")
    with blank.connect() as worker:
        worker.execute("SELECT 1 FROM runs WHERE id = 1 FOR UPDATE")
        worker.execute("INSERT INTO \"worker.pulse\" VALUES ('slow', timezone('UTC', now()))")
        sweeping = asyncio.ensure_future(sweep(target))
        await asyncio.to_thread(blank.await_lock_wait)
        worker.commit()
        assert (await sweeping).error is None
    assert blank.outcomes() == {"1": "sign_of_life", "2": "marked"}


async def test_a_callers_old_snapshot_never_hides_a_workers_beat(
    blank: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beat is in another table, so no conflict on the run's row tells of it."""
    workers(blank, "text", "text")
    target = configure(
        tmp_path,
        monkeypatch,
        """
        [targets.workers]
        table = "runs"
        columns = {worker_id = "locked By"}

        [targets.workers.worker_heartbeat]
        table = '"worker.pulse"'
        key = "which?"
        run_key = "locked By"
        last_seen = "when"
        """,
        "workers",
    )
    run_of(blank, 1, "slow", "2 hours")
    async with AsyncSession(engine) as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        [run] = await detect(session, request(target))
        blank.do("INSERT INTO \"worker.pulse\" VALUES ('slow', timezone('UTC', now()))")
        try:
            assert await mark_run_as_crashed(session, run) is False
        except (DBAPIError, ConfigurationError):
            await session.rollback()
        else:
            await session.commit()
    assert blank.one("SELECT status FROM runs") == "running"


# Rules.


def ruled(blank: Database, *rules: Rule, **described: Any) -> Target:
    return simple(blank, "error text", "tenant_id text", rules=rules, **described)


async def test_the_first_rule_that_matches_decides(blank: Database) -> None:
    target = ruled(
        blank,
        Rule(match={"task": "nightly-*"}, never=True),
        Rule(match={"task": "*-report"}, threshold_minutes=300),
        Rule(match={"task": "quick"}, threshold_minutes=5),
    )
    add(blank, "never", task="nightly-report", age="9 days")
    add(blank, "long and young", task="weekly-report", age="4 hours")
    add(blank, "long and old", task="weekly-report", age="6 hours")
    add(blank, "quick and young", task="quick", age="4 minutes")
    add(blank, "quick and old", task="quick", age="6 minutes")
    add(blank, "no task", age="20 minutes")
    assert (await fleet(blank, target)).exempt == 1
    report = await sweep(target)
    assert report.as_dict()["exempt"] == 1
    assert "1 exempt by a rule" in report.headline()
    rules = {v["run_id"]: (v["rule"], v["threshold"]) for v in blank.verdicts()}
    assert rules == {
        "run": ("silence >= threshold", timedelta(minutes=30)),
        "long and old": (
            "silence >= threshold of rule 2 (task = *-report)",
            timedelta(minutes=300),
        ),
        "quick and old": ("silence >= threshold of rule 3 (task = quick)", timedelta(minutes=5)),
    }
    assert blank.sweeps()[0]["exempt"] == 1


@pytest.mark.parametrize(
    ("pattern", "fit", "misfit"),
    [
        ("*", ["", "a", "a\nb"], [None]),
        ("a*", ["a", "ab", "a*"], ["ba", "A", ""]),
        ("*a", ["a", "ba"], ["ab"]),
        ("a?c", ["abc", "a?c", "a\nc"], ["ac", "abbc"]),
        ("100%", ["100%"], ["100", "100 per cent"]),
        ("100%*", ["100%", "100% wool"], ["100 wool"]),
        ("a_c*", ["a_c"], ["abc"]),
        ("a\\b?", ["a\\bc"], ["abc", "a\\b"]),
        ("\\*", ["\\", "\\x"], ["*", "x"]),
        ("*\\", ["\\", "x\\"], ["x"]),
        ("'; --*", ["'; --", "'; -- x"], ["x"]),
        ("%s :x {y}*", ["%s :x {y}!"], ["x"]),
    ],
)
async def test_only_stars_and_question_marks_are_wild(
    blank: Database, pattern: str, fit: list[str], misfit: list[str | None]
) -> None:
    target = ruled(blank, Rule(match={"task": pattern}, never=True))
    blank.do("DELETE FROM jobs")
    for number, task in enumerate([*fit, *misfit]):
        add(blank, str(number), task=task)
    found = {int(run.id) for run in await seen(blank, target)}
    assert found == set(range(len(fit), len(fit) + len(misfit)))


async def test_a_rule_may_look_at_all_it_names_at_once(blank: Database) -> None:
    match = {"task": "t", "tenant_id": "a*", "worker_id": "worker-?", "status": "running"}
    target = ruled(blank, Rule(match=match, never=True))
    add(blank, "all", task="t")
    add(blank, "other task", task="u")
    add(blank, "other worker", task="t", worker="worker-10")
    add(blank, "other status", "queued", task="t")
    blank.do("UPDATE jobs SET tenant_id = 'acme'")
    add(blank, "no tenant", task="t")
    found = {run.id for run in await seen(blank, target)}
    assert found == {"run", "other task", "other worker", "other status", "no tenant"}


async def test_each_status_may_have_a_threshold_and_a_reason_and_who_asks_comes_first(
    blank: Database,
) -> None:
    target = ruled(
        blank,
        Rule(match={"status": "queued"}, threshold_minutes=60, reason="nobody took it"),
        Rule(match={"status": "claimed"}, threshold_minutes=60),
        in_flight=("queued", "claimed", "running"),
    )
    add(blank, "queued", "queued")
    add(blank, "queued lately", "queued", age="45 minutes")
    add(blank, "claimed", "claimed")
    assert (await sweep(target)).recovered == 3
    reasons = {v["run_id"]: v["reason"] for v in blank.verdicts()}
    assert reasons == {
        "run": DEFAULT_REASON,
        "queued": "nobody took it",
        "claimed": f"{DEFAULT_REASON}, while claimed",
    }
    for row in blank.do("SELECT id, error FROM jobs WHERE status = 'crashed'"):
        assert row["error"].startswith(f"{reasons[row['id']]}; last sign of life ")

    blank.do("UPDATE jobs SET status = 'queued'")
    blank.do("DELETE FROM jobs WHERE id <> 'queued'")
    assert (await sweep(target, reason="deploy 42")).recovered == 1
    assert blank.one("SELECT error FROM jobs").startswith("deploy 42; ")
    assert blank.verdicts()[-1]["reason"] == "deploy 42"


@pytest.mark.parametrize("now", ["never", "patient"])
async def test_a_run_that_comes_under_a_gentler_rule_since_it_was_seen_is_left_alone(
    blank: Database, engine: AsyncEngine, now: str
) -> None:
    target = ruled(
        blank,
        Rule(match={"task": "never"}, never=True),
        Rule(match={"task": "patient"}, threshold_minutes=600),
    )
    asked = request(target)
    [run] = await look(engine, asked)
    blank.do("UPDATE jobs SET task = %s", now)
    before = blank.do("SELECT xmin::text, * FROM jobs")
    assert await outcome_of(engine, asked, run) == "sign_of_life"
    assert blank.do("SELECT xmin::text, * FROM jobs") == before
    assert blank.outcomes() == {"run": "sign_of_life"}


async def test_a_run_that_came_under_a_stricter_rule_is_marked_as_it_was_seen(
    blank: Database, engine: AsyncEngine
) -> None:
    target = ruled(blank, Rule(match={"task": "strict"}, threshold_minutes=1))
    asked = request(target)
    [run] = await look(engine, asked)
    blank.do("UPDATE jobs SET task = 'strict'")
    assert await outcome_of(engine, asked, run) == "marked"
    assert blank.verdicts()[0]["rule"] == "silence >= threshold"


async def test_a_rule_that_looks_at_a_column_that_is_not_there_is_refused(
    blank: Database,
) -> None:
    blank.do("CREATE TABLE t (id int PRIMARY KEY, status text, created_at timestamptz)")
    rules = (Rule(match={"task": "x"}, never=True),)
    with pytest.raises(ConfigurationError, match=r"rules\.0\.match looks at 'task'"):
        migrate(Target(name="t", table="t", rules=rules))


# Outcomes by name, in the table's own words.

MOVES: dict[str, tuple[LiteralString, str]] = {
    "ends well": ("UPDATE jobs SET status = 'erledigt'", "finished_first"),
    "fails": ("UPDATE jobs SET status = 'kaputt'", "finished_first"),
    "has a word that nobody knows": ("UPDATE jobs SET status = '?'", "finished_first"),
    "is put back": ("UPDATE jobs SET status = 'wartet'", "sign_of_life"),
    "is put back and given up": (
        "UPDATE jobs SET status = 'wartet', worker_id = NULL",
        "changed_hands",
    ),
    "moves on": ("UPDATE jobs SET status = 'packt'", "sign_of_life"),
    "beats": ("UPDATE jobs SET heartbeat_at = now()", "sign_of_life"),
    "changes hands": ("UPDATE jobs SET worker_id = 'worker-2'", "changed_hands"),
    "vanishes": ("DELETE FROM jobs", "vanished"),
}


@pytest.mark.parametrize("move", MOVES)
async def test_what_a_run_did_meanwhile_has_a_name_in_any_words(
    blank: Database, engine: AsyncEngine, move: str
) -> None:
    statement, outcome = MOVES[move]
    target = simple(
        blank,
        in_flight=("läuft", "packt"),
        waiting=("wartet",),
        terminal=("erledigt", "kaputt"),
        crashed="kaputt",
    )
    blank.do("UPDATE jobs SET status = 'läuft'")
    asked = request(target)
    [run] = await look(engine, asked)
    blank.do(statement)
    before = blank.do("SELECT xmin::text, * FROM jobs")
    assert await outcome_of(engine, asked, run) == outcome
    assert blank.do("SELECT xmin::text, * FROM jobs") == before
    [verdict] = blank.verdicts()
    assert verdict["outcome"] == outcome
    assert (verdict["found"] or {}).get("status") == (before[0]["status"] if before else None)


async def test_a_snapshot_of_another_target_is_marked_in_that_targets_table(
    blank: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(
        tmp_path,
        monkeypatch,
        """
        [targets.default]
        table = "jobs"
        crashed = "failed"
        in_flight = ["running"]

        [targets.other]
        table = "other jobs"
        crashed = "lost"
        in_flight = ["busy"]
        columns = {id = "the id", status = "state"}
        """,
        "default",
    )
    simple(blank, in_flight=("running",))
    blank.do(
        'CREATE TABLE "other jobs" ("the id" text PRIMARY KEY, state text, created_at timestamptz,'
        " error text);"
        "INSERT INTO \"other jobs\" VALUES ('run', 'busy', now() - interval '2 hours')"
    )
    [run] = await look(engine, request(find_target("other")))
    async with AsyncSession(engine) as session, session.begin():
        assert await mark_run_as_crashed(session, run, "node lost") is True
    assert statuses(blank) == {"run": "running"}
    [row] = blank.do('SELECT state, error FROM "other jobs"')
    assert row["state"] == "lost"
    assert row["error"].startswith("node lost; ")
    assert [(v["target"], v["run_id"]) for v in blank.verdicts()] == [("other", "run")]
    unknown = dataclasses.replace(run, target="unheard of")
    async with AsyncSession(engine) as session:
        with pytest.raises(ConfigurationError, match="no target 'unheard of'"):
            await mark_run_as_crashed(session, unknown)


# The truth trigger on another team's table.

ODD: LiteralString = """
CREATE SCHEMA "a.b";
CREATE TABLE "a.b"."Läufe %s" (
    "Mandant" uuid DEFAULT '00000000-0000-0000-0000-00000000000a',
    "n'r" int,
    "slot" date DEFAULT '2024-01-02',
    "st\\at""us" text NOT NULL,
    "wer:" text,
    "why {}" text,
    note text,
    "time" timestamptz DEFAULT now() - interval '2 hours',
    PRIMARY KEY ("Mandant", "n'r", "slot")
)
"""
ODD_TARGET = Target(
    name="odd",
    table='"a.b"."Läufe %s"',
    in_flight=("läuft",),
    waiting=("it's waiting",),
    terminal=("fertig\\", 'it\'s "lost"'),
    crashed='it\'s "lost"',
    truth_trigger=True,
    columns=Columns(
        id=("Mandant", "n'r", "slot"),
        status='st\\at"us',
        worker_id="wer:",
        error="why {}",
        created_at="time",
    ),
)


def odd(blank: Database) -> None:
    blank.do(ODD)
    blank.do(
        'INSERT INTO "a.b"."Läufe %s" ("n\'r", "st\\at""us") VALUES'
        " (1, 'läuft'), (2, 'it''s waiting'), (3, 'fertig\\'), (4, 'it''s \"lost\"')"
    )


@pytest.mark.parametrize("number", [1, 3, 4], ids=["marked", "finished", "lost"])
@pytest.mark.parametrize(
    "late",
    [
        'UPDATE "a.b"."Läufe %s" SET "st\\at""us" = \'läuft\'',
        'UPDATE "a.b"."Läufe %s" SET "wer:" = \'late\'',
        'UPDATE "a.b"."Läufe %s" SET "why {}" = \'late\'',
        'UPDATE "a.b"."Läufe %s" SET "n\'r" = 99',
        'UPDATE "a.b"."Läufe %s" SET "slot" = \'2025-01-01\'',
        'DELETE FROM "a.b"."Läufe %s"',
    ],
)
async def test_a_terminal_row_of_any_table_never_changes_again(
    blank: Database, late: LiteralString, number: int
) -> None:
    odd(blank)
    migrate(ODD_TARGET)
    assert (await sweep(ODD_TARGET)).recovered == 1
    before = blank.do('SELECT xmin::text, * FROM "a.b"."Läufe %s"')
    with pytest.raises(psycopg.errors.RaiseException) as refused:
        do(blank, sql.SQL('{} WHERE "n\'r" = {}').format(sql.SQL(late), number))
    assert refused.value.sqlstate == "P0001"
    key = f"00000000-0000-0000-0000-00000000000a, {number}, 2024-01-02"
    assert str(refused.value).startswith(f"TRUTH_VIOLATION: run {key} is ")
    assert blank.do('SELECT xmin::text, * FROM "a.b"."Läufe %s"') == before


def test_the_truth_trigger_lets_through_what_is_none_of_its_business(blank: Database) -> None:
    odd(blank)
    migrate(ODD_TARGET)
    blank.do('UPDATE "a.b"."Läufe %s" SET note = \'read\' WHERE "n\'r" = 3')
    blank.do('UPDATE "a.b"."Läufe %s" SET "st\\at""us" = \'läuft\' WHERE "n\'r" = 2')
    blank.do('UPDATE "a.b"."Läufe %s" SET "st\\at""us" = \'fertig\\\' WHERE "n\'r" = 1')
    blank.do('DELETE FROM "a.b"."Läufe %s" WHERE "n\'r" = 2')
    assert blank.one('SELECT count(*) FROM "a.b"."Läufe %s"') == 3


def test_the_truth_trigger_comes_once_follows_the_description_and_goes(blank: Database) -> None:
    odd(blank)
    without = ODD_TARGET.model_copy(update={"truth_trigger": False})
    migrate(without)
    assert triggers(blank) == []
    assert migrate(ODD_TARGET).done == ("the truth trigger: a terminal row never changes again",)
    assert migrate(ODD_TARGET).done == ()
    more = ODD_TARGET.model_copy(update={"terminal": (*(ODD_TARGET.terminal or ()), "zurück")})
    assert migrate(more).done == ("the truth trigger: a terminal row never changes again",)
    [definition] = triggers(blank)
    assert "zurück" in definition
    assert unmigrate(more).after == "none"
    assert triggers(blank) == []
    assert blank.one('SELECT count(*) FROM "a.b"."Läufe %s"') == 4


def triggers(blank: Database) -> list[str]:
    rows = blank.do(
        "SELECT pg_get_triggerdef(t.oid) AS told FROM pg_trigger t"
        " JOIN pg_class c ON c.oid = t.tgrelid WHERE NOT tgisinternal AND relname LIKE 'L%'"
    )
    return [row["told"] for row in rows]


# Partitioned tables.

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
    assert all(name.endswith("_in_flight") for name in used)


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


# What cannot be swept is refused, with a reason and before anything is written.


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


def names_in(plan: dict[str, Any]) -> list[str]:
    """The indexes, and the tables that are read whole, of a plan."""
    own = plan.get("Index Name") or (
        f"the whole of {plan['Relation Name']}" if plan["Node Type"] == "Seq Scan" else None
    )
    below = [name for part in plan.get("Plans", []) for name in names_in(part)]
    return [own, *below] if own else below
