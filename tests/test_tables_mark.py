"""Any runs table: what the mark writes, and what a run did meanwhile, in the table's own words."""

import asyncio
import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import NullPool

from orphan_recovery import ConfigurationError, judge, mark_run_as_crashed
from orphan_recovery.alive.beat import beat
from orphan_recovery.catalog import look_up
from orphan_recovery.database import database_url, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.hold import Decision
from orphan_recovery.mark import mark
from orphan_recovery.record import note_direct_call
from orphan_recovery.report import SweepReport
from orphan_recovery.request import DEFAULT_REASON
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.summarize import summarize_target
from orphan_recovery.sweep import begin, tell_of
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target
from support import Database
from tables_support import (
    add,
    configure,
    do,
    look,
    outcome_of,
    request,
    set_for_all,
    simple,
    statuses,
    sweep,
)


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


async def test_a_status_may_read_otherwise_than_it_was_configured(
    blank: Database, engine: AsyncEngine
) -> None:
    """``1`` is ``1.0`` there. A run whose row somebody holds has not finished by that."""
    blank.do(
        "CREATE TABLE jobs (id text PRIMARY KEY, status numeric(3, 1) NOT NULL, worker_id text,"
        " created_at timestamptz, heartbeat_at timestamptz)"
    )
    blank.do("INSERT INTO jobs VALUES ('run', 1, 'w', now() - interval '2 hours', NULL)")
    target = Target(name="jobs", table="jobs", in_flight=("1",), crashed="4")
    migrate(target)
    [run] = await look(engine, asked := request(target))
    with blank.connect() as other:
        other.execute("SELECT FROM jobs FOR UPDATE")
        async with engine.begin() as connection:
            await note_direct_call(connection, asked)
            assert await mark(connection, asked, [run], skip_locked=True) == [None]
            beaten = await beat(connection, await runs_table(connection, target), [("run", "w")])
            assert beaten.lost == {}
    assert (await sweep(target)).recovered == 1


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


async def test_the_newest_of_a_ledger_are_told_however_old_they_are(blank: Database) -> None:
    target = simple(blank, crashed="failed", in_flight=("running",))
    assert (await sweep(target)).recovered == 1
    blank.do(
        "INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome, status_seen,"
        " sign_of_life, evidence, silence, threshold, rule, reason, judged_at) SELECT sweep_id,"
        " 'old ' || lpad(n::text, 2, '0'), 'simple', 'marked', 'running', now(), 'age', '1 h',"
        " '1 h', 'r', 'r', now() - interval '40 days' - n * interval '1 day'"
        " FROM orphan_recovery.sweeps, generate_series(1, 12) AS n"
    )
    summary = await summarize_target(target)
    assert summary["total_crashed"] == 13
    told = [run["run_id"] for run in summary["recent_crashes"]]
    assert told == ["run", *(f"old {n:02}" for n in range(1, 10))]


@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "page by page"])
async def test_a_key_may_have_rules_of_its_own_for_comparing(
    blank: Database, limit: int | None
) -> None:
    """The ledger compares its run ids by those of the database."""
    target = simple(blank)
    blank.do('ALTER TABLE jobs ALTER id TYPE text COLLATE "POSIX"')
    add(blank, "second", age="3 hours")
    with blank.connect() as other:  # so that it is passed over first, and then waited for
        other.execute("SELECT FROM jobs WHERE id = 'run' FOR UPDATE")
        sweeping = asyncio.ensure_future(sweep(target, limit=limit))
        await asyncio.to_thread(blank.await_lock_wait)
        other.rollback()
    report = await sweeping
    assert (report.error, report.recovered) == (None, 2)
    assert blank.outcomes() == {"run": "marked", "second": "marked"}
    assert (await summarize_target(target))["total_crashed"] == 2


@pytest.mark.parametrize(
    ("made", "shows_places"),
    [
        ("CREATE TABLE {} (id int)", True),
        ("CREATE TABLE {} (id int) PARTITION BY HASH (id)", False),
        ("CREATE TABLE {} (id int); CREATE TABLE child () INHERITS (runs)", False),
        (
            "CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler;"
            " CREATE TABLE {} (id int) USING other",
            False,
        ),
        ("CREATE VIEW {} AS SELECT 1 AS id", False),
    ],
    ids=["heap", "parts", "children", "another access method", "view"],
)
def test_a_row_has_one_place_in_a_single_heap_only(
    blank: Database, made: LiteralString, shows_places: bool
) -> None:
    do(blank, sql.SQL(made).format(sql.Identifier("runs")))
    engine = create_engine(database_url(blank.url), poolclass=NullPool)
    with engine.connect() as connection:
        found = look_up(connection, None, "runs")
    assert found is not None
    assert found.shows_places is shows_places


async def test_a_table_with_children_is_swept_by_keys_for_a_place_is_none_of_its_own(
    blank: Database,
) -> None:
    """The orphan and a run that lives lie at the same place, each in its own table."""
    target = simple(blank)
    blank.do("CREATE TABLE more () INHERITS (jobs)")
    blank.do(
        "INSERT INTO more (id, status, worker_id, created_at)"
        " VALUES ('lives', 'running', 'worker-2', now()), ('silent', 'running', 'worker-3',"
        " now() - interval '2 hours')"
    )
    assert place_of(blank, "run") == place_of(blank, "lives")
    assert (await sweep(target)).recovered == 2
    assert statuses(blank) == {"run": "crashed", "lives": "running", "silent": "crashed"}


async def test_no_run_of_a_child_that_came_in_mid_sweep_is_taken_for_another_at_its_place(
    blank: Database, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "mark_page", None)  # nor does the ledger's key have to refuse it
    report = SweepReport(request(simple(blank)))
    async with transaction(engine) as connection:
        tell_of(await begin(connection, report.request), report)
    blank.do("CREATE TABLE more () INHERITS (jobs)")
    blank.do(
        "INSERT INTO more (id, status, worker_id, created_at)"
        " VALUES ('lives', 'running', 'worker-2', now())"
    )
    assert place_of(blank, "run") == place_of(blank, "lives")
    await judge.judge_all(engine, report, Decision(None, None), [])
    assert statuses(blank) == {"run": "crashed", "lives": "running"}
    assert report.recovered == 1


def place_of(blank: Database, run: str) -> str:
    return str(blank.one("SELECT ctid::text FROM jobs WHERE id = %s", run))


async def test_another_target_of_the_same_table_has_a_summary_of_its_own(blank: Database) -> None:
    first = simple(blank, crashed="failed", in_flight=("running",))
    add(blank, "queued", "queued")
    second = first.model_copy(update={"name": "second", "in_flight": ("queued",)})
    assert (await sweep(first)).recovered == 1
    assert (await sweep(second)).recovered == 1
    told = [await summarize_target(target) for target in (first, second)]
    assert [t["total_crashed"] for t in told] == [1, 1]
    assert [t["recent_crashes"][0]["run_id"] for t in told] == ["run", "queued"]


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


@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
async def test_a_server_that_reads_no_null_in_an_array_hides_no_orphan(
    blank: Database, limit: int | None
) -> None:
    target = simple(blank)
    add(blank, "nobody's", worker=None)
    set_for_all(blank, "array_nulls = off")
    report = await sweep(target, limit=limit)
    assert (report.recovered, report.skipped, report.failed) == (2, 0, 0)


@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
async def test_a_key_comes_back_as_it_went_however_the_server_shows_numbers(
    blank: Database, limit: int | None
) -> None:
    blank.do(
        "CREATE TABLE jobs (id float8 PRIMARY KEY, status text NOT NULL, created_at timestamptz)"
    )
    blank.do(
        "INSERT INTO jobs SELECT 0.1::float8 * n, 'running', now() - interval '2 hours'"
        " FROM generate_series(1, 9) AS n"
    )
    target = Target(name="jobs", table="jobs")
    migrate(target)
    set_for_all(blank, "extra_float_digits = 0")
    report = await asyncio.wait_for(sweep(target, limit=limit), 60)
    assert (report.recovered, report.skipped, report.failed) == (9, 0, 0)


async def test_a_role_with_an_encoding_of_its_own_reads_texts_all_the_same(
    blank: Database,
) -> None:
    target = simple(blank)
    add(blank, "läuft")
    set_for_all(blank, "client_encoding = 'SQL_ASCII'")
    assert (await sweep(target)).recovered == 2
    assert sorted(blank.outcomes()) == ["läuft", "run"]


async def test_a_run_that_was_tried_again_in_place_and_ended_was_marked_by_nobody(
    blank: Database, engine: AsyncEngine
) -> None:
    """Its crash of before is none of this one, though both read alike."""
    target = simple(blank, crashed="failed", terminal=("completed", "failed"))
    assert (await sweep(target)).recovered == 1
    blank.do("UPDATE jobs SET status = 'running', worker_id = 'again', heartbeat_at = now()")
    blank.do("SELECT pg_sleep(0.5)")
    asked = request(target, worker="again", returned=timedelta(seconds=0.3))
    [run] = await look(engine, asked)
    blank.do("UPDATE jobs SET status = 'failed'")
    assert await outcome_of(engine, asked, run) == "finished_first"
