"""Any runs table: signs of life that other tables keep."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery import ConfigurationError, mark_run_as_crashed
from orphan_recovery.detect import detect
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Columns, Elsewhere, Target
from support import Database
from tables_support import configure, do, fleet, look, outcome_of, request, seen, set_for_all, sweep

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
