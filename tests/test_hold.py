"""Hold: a sweep that would crash most of a fleet stops and asks; and what a person releases."""

import asyncio
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from orphan_recovery import ConfigurationError
from orphan_recovery.approve import approve
from orphan_recovery.cli import main as cli
from orphan_recovery.database import database_url, make_engine, transaction
from orphan_recovery.doctor.examine import examine
from orphan_recovery.doctor.finding import Finding, Level
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.report_pages import as_markdown
from orphan_recovery.request import SweepRequest
from orphan_recovery.target import Columns, Rule, Target
from orphan_recovery.targets import find_target
from orphan_recovery.words import iso
from prefect_support import run
from sql_support import a_role, printed, psql, seen_by
from support import Database, database_of_its_own, ended_in_the_ledger, free_port, until
from tables_support import do


async def sweep(**asked: Any) -> SweepReport:
    """One sweep of the start-up path."""
    return await run_sweep(SweepRequest(asked_by="test", **asked))


async def release(db: Database, hold: UUID, **asked: Any) -> tuple[UUID, Any]:
    engine = make_engine(database_url(db.url))
    try:
        async with transaction(engine) as connection:
            done = await approve(connection, str(hold), by="a person", **asked)
            return done.hold_id, done.until
    finally:
        await engine.dispose()


def add_workers(db: Database, count: int, *, silent: bool, first: int = 1, **run: Any) -> list[str]:
    """So many workers with a run each, of the same name; silent for two hours, or just begun."""
    run = {"age": "2 hours" if silent else "1 minute", **run}
    names = [f"{'silent' if silent else 'live'}-{n:02}" for n in range(first, first + count)]
    return [db.add_run(name, worker=name, **run) for name in names]


def fall_silent(db: Database, runs: list[str], lasting: str = "1 hour") -> None:
    db.do(
        "UPDATE worker_runs SET created_at = now() - %s::interval,"
        " started_at = now() - %s::interval WHERE id = ANY (%s)",
        *(lasting, lasting, runs),
    )


def beat(db: Database, runs: list[str]) -> None:
    db.do("UPDATE worker_runs SET heartbeat_at = now() WHERE id = ANY (%s)", runs)


def holds(db: Database) -> list[dict[str, Any]]:
    return db.do("SELECT * FROM orphan_recovery.holds ORDER BY opened_at")


def approvals(db: Database) -> list[dict[str, Any]]:
    return db.do("SELECT * FROM orphan_recovery.approvals ORDER BY approved_at")


def runs_of(db: Database, hold: UUID) -> list[str]:
    named = "SELECT run_id FROM orphan_recovery.hold_runs WHERE hold_id = %s ORDER BY run_id"
    return [row["run_id"] for row in db.do(named, hold)]


def crashed(db: Database) -> set[str]:
    return {run for run, status in db.statuses().items() if status == "crashed"}


def plant_hold(db: Database, hold_id: str, *, target: str = "default") -> str:
    """A hold in the ledger, with the sweep that opened it."""
    db.do(
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, opened_at) VALUES (%s, %s, 'worker_runs', 'test', 'test',"
        " '30 minutes', '{}', '0', now())",
        *(hold_id, target),
    )
    db.do(
        "INSERT INTO orphan_recovery.holds (hold_id, target, sweep_id, opened_at, evidence)"
        " VALUES (%s, %s, %s, now(), '{}')",
        *(hold_id, target, hold_id),
    )
    return hold_id


# What is held


async def test_a_sweep_that_would_crash_most_of_a_fleet_marks_nothing_and_asks(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    silent = add_workers(db, 11, silent=True)
    live = add_workers(db, 9, silent=False)
    report = await sweep()
    assert set(db.statuses().values()) == {"running"}
    assert (report.ended_well, report.is_held, report.detected) == (False, True, 0)

    [hold] = holds(db)
    [told] = db.sweeps()
    assert (told["ended_as"], told["hold"], told["marked"]) == ("held", hold["hold_id"], 0)
    assert (hold["target"], hold["sweep_id"]) == ("default", told["sweep_id"])
    assert (hold["ended_at"], hold["ended_as"]) == (None, None)
    assert runs_of(db, hold["hold_id"]) == silent
    assert live[0] not in runs_of(db, hold["hold_id"])
    saw = hold["evidence"]
    assert (saw["silent_workers"], saw["workers"], saw["orphans"]) == (11, 20, 11)
    assert saw["some_silent_workers"] == silent[:10]
    assert (saw["threshold_minutes"], saw["hold_share"]) == (30, 0.5)
    assert (saw["failed_over"], saw["last_sweep_at"]) == (False, None)
    assert saw["first_silent_since"] <= saw["silent_since"] < saw["server_started_at"]
    assert db.verdicts() == []

    as_dict = report.as_dict()
    assert (as_dict["held"], as_dict["hold"]) == (11, str(hold["hold_id"]))
    assert report.headline().startswith(
        f"HELD: 11 of 20 workers look dead since {saw['silent_since']} (silent-01, silent-02, "
        f"silent-03 and 8 more), 11 orphaned runs not marked (hold {hold['hold_id']}); no other "
        "orphaned run found"
    )
    shown = as_markdown(report)
    assert "## What was not dared" in shown
    assert f"\n- 11 of 20 workers look dead since {saw['silent_since']}" in shown
    assert f"\n- silent: `{saw['some_silent_workers'][0]}`, " in shown
    assert " and 1 more\n" in shown
    [step] = report.next_steps()
    assert f"orphan-recovery approve {hold['hold_id']} --target default" in step
    [event] = [record for record in caplog.records if record.msg == "orphan_recovery_held"]
    assert event.levelno == logging.ERROR
    assert vars(event)["hold_id"] == str(hold["hold_id"])
    assert vars(event)["sweep_id"] == str(hold["sweep_id"])
    assert (vars(event)["runs"], vars(event)["is_new"]) == (11, True)
    assert vars(event)["evidence"] == saw


def test_the_command_line_exits_3_says_what_it_saw_and_what_to_do(db: Database) -> None:
    add_workers(db, 10, silent=True)
    looked = run("orphan-recovery", "sweep", "--dry-run")
    assert "10 orphaned runs would be judged" in looked.stdout
    told = "a sweep would not believe that at once, because 10 of 10 workers look dead"
    assert told in looked.stdout
    done = run("orphan-recovery", "sweep")
    [hold] = holds(db)
    assert done.returncode == 3
    assert done.stdout.startswith("HELD: 10 of 10 workers look dead since ")
    assert f"(hold {hold['hold_id']})" in done.stdout
    assert "next: See whether those workers live (silent-01, silent-02, " in done.stderr
    assert f"`orphan-recovery approve {hold['hold_id']} --target default`" in done.stderr
    as_json = run("orphan-recovery", "sweep", "--json")
    assert as_json.returncode == 3
    assert json.loads(as_json.stdout)["hold"] == str(hold["hold_id"])
    well = run("orphan-recovery", "doctor")
    assert f"hold {hold['hold_id']} stands since " in well.stdout
    assert f"`orphan-recovery approve {hold['hold_id']} --target default`" in well.stdout
    assert well.returncode == 1, "somebody is to be woken for it"
    assert "no sweep of this target has ended well yet; the last was held, " in well.stdout
    assert "          → see hold\n" in well.stdout, "another sweep would be held as well"


async def test_doctor_says_of_a_hold_whether_somebody_has_released_it(db: Database) -> None:
    add_workers(db, 10, silent=True)
    held = (await sweep()).held
    assert held is not None

    async def line() -> Finding:
        [found] = [finding for finding in await examine(Target()) if finding.about == "hold"]
        return found

    assert (await line()).level is Level.FAILURE
    _, expires_at = await release(db, held.hold_id)
    told = await line()
    assert (told.level, told.way_out) == (Level.OK, None)
    assert f"it is released until {iso(expires_at)}, and the next sweep marks its" in told.told
    db.do("ALTER TABLE orphan_recovery.approvals DISABLE TRIGGER USER")
    db.do("UPDATE orphan_recovery.approvals SET expires_at = now() - interval '1 second'")
    assert (await line()).level is Level.FAILURE, "a release that has expired is none"


@pytest.mark.parametrize(
    ("silent", "live", "held"),
    [(10, 10, False), (11, 10, True), (9, 0, False), (10, 0, True), (5, 4, False)],
)
async def test_a_share_is_held_above_the_limit_and_from_the_least_sample_on(
    db: Database, silent: int, live: int, held: bool
) -> None:
    orphans = add_workers(db, silent, silent=True)
    add_workers(db, live, silent=False)
    report = await sweep()
    assert report.is_held == held
    assert crashed(db) == (set() if held else set(orphans))
    assert len(holds(db)) == held


async def test_share_and_least_sample_are_the_targets_own(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__HOLD_SHARE", "0.25")
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__HOLD_LEAST_WORKERS", "4")
    add_workers(db, 1, silent=True)
    live = add_workers(db, 3, silent=False)
    assert (await sweep()).recovered == 1
    fall_silent(db, live[:1])
    assert (await sweep()).recovered == 1  # of three workers in flight
    add_workers(db, 2, silent=True, first=10)
    assert (await sweep()).is_held


async def test_a_worker_with_one_live_run_is_not_silent(db: Database) -> None:
    """It lives, whatever became of its other runs: those are marked."""
    silent = add_workers(db, 12, silent=True)
    db.add_run("the live one", worker=silent[0], age="1 minute")
    db.add_run("another live one", worker=silent[1], age="1 minute")
    add_workers(db, 8, silent=False)
    report = await sweep()
    assert (report.held, report.recovered) == (None, 12)


@pytest.mark.parametrize("rule", [{"never": True}, {"threshold_minutes": 240}], ids=str)
async def test_a_run_that_may_be_silent_for_longer_is_no_sign_of_life(
    db: Database, rule: dict[str, Any]
) -> None:
    """Of its worker nothing was heard by it either."""
    silent = add_workers(db, 12, silent=True)
    for worker in silent:
        db.add_run(f"{worker}, long", worker=worker, age="2 hours")
    db.do("UPDATE worker_runs SET task = 'long' WHERE id LIKE '%, long'")
    target = Target(rules=(Rule(match={"task": "long"}, **rule),))
    assert (await sweep(target=target)).is_held
    [hold] = holds(db)
    assert (hold["evidence"]["silent_workers"], hold["evidence"]["workers"]) == (12, 12)
    assert crashed(db) == set()
    beat(db, [f"{worker}, long" for worker in silent])  # now it is one
    assert (await sweep(target=target)).recovered == 12


async def test_a_run_out_of_scope_that_is_as_silent_is_no_sign_of_life(db: Database) -> None:
    """Workers serve several tenants: a sweep of one of them may crash what the fleet holds, too."""
    silent = add_workers(db, 12, silent=True)
    others = [db.add_run(f"{worker}, other", worker=worker, tenant="other") for worker in silent]
    assert (await sweep(tenant="tenant-1")).is_held
    [hold] = holds(db)
    assert (hold["evidence"]["silent_workers"], hold["evidence"]["orphans"]) == (12, 12)
    assert crashed(db) == set()
    beat(db, others)  # now they are one
    report = await sweep(tenant="tenant-1")
    assert report.fleet is not None
    assert report.fleet.orphans == 12
    assert (await sweep()).recovered == 12


async def test_runs_that_beat_and_name_no_worker_are_counted_one_by_one(db: Database) -> None:
    """A fleet that leaves the column empty is one all the same."""
    for n in range(12):
        db.add_run(f"run-{n:02}", worker=None, beat="2 hours")
    db.add_run("run-99", worker=None, age="2 hours", beat="1 minute")
    assert (await sweep()).is_held
    [hold] = holds(db)
    assert (hold["evidence"]["silent_workers"], hold["evidence"]["workers"]) == (12, 13)
    assert crashed(db) == set()


async def test_runs_that_no_worker_holds_are_counted_on_neither_side(db: Database) -> None:
    queued = [
        db.add_run(f"queued-{n}", status="queued", worker=None, age="3 hours") for n in range(30)
    ]
    silent = add_workers(db, 5, silent=True)
    add_workers(db, 5, silent=False)
    assert (await sweep()).held is None
    assert crashed(db) == {*queued, *silent}


async def test_what_is_held_is_every_orphan_that_the_sweep_saw(db: Database) -> None:
    """Those of a live worker, and those of none, among them: nobody knows yet what happened."""
    silent = add_workers(db, 11, silent=True)
    live = add_workers(db, 9, silent=False)
    db.add_run("queued", status="queued", worker=None, age="3 hours")
    db.add_run("stuck", worker=live[0], age="3 hours")
    report = await sweep()
    assert report.held is not None
    assert runs_of(db, report.held.hold_id) == sorted([*silent, "queued", "stuck"])
    assert (report.held.runs, crashed(db)) == (13, set())
    saw = report.held.evidence
    assert (saw["silent_workers"], saw["workers"], saw["orphans"]) == (11, 20, 13)


@pytest.mark.parametrize(("silent", "held"), [(10, False), (11, True)])
async def test_a_table_that_keeps_no_worker_is_counted_in_runs(
    db: Database, silent: int, held: bool
) -> None:
    db.do("CREATE TABLE jobs (no int PRIMARY KEY, status text NOT NULL, born timestamptz)")
    db.do(
        "INSERT INTO jobs SELECT n, 'running', now() - CASE WHEN n <= %s THEN interval '2 hours'"
        " ELSE interval '1 minute' END FROM generate_series(1, 20) AS n",
        silent,
    )
    target = Target(
        name="jobs",
        table="jobs",
        in_flight=("running",),
        terminal=("crashed", "done"),
        columns=Columns(id=("no",), created_at="born"),
    )
    report = await sweep(target=target)
    assert report.is_held == held
    marked = db.one("SELECT count(*) FROM jobs WHERE status = 'crashed'")
    assert marked == (0 if held else silent)
    if report.held is not None:
        assert (report.held.evidence["silent_workers"], report.held.runs) == (11, 11)
        assert sorted(map(int, runs_of(db, report.held.hold_id))) == list(range(1, 12))


@contextmanager
def a_gate(db: Database) -> Iterator[None]:
    """Whoever calls the database's function ``wait_here`` stands there until this ends."""
    db.do(
        "CREATE FUNCTION wait_here() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END $$"
    )
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(42)")
        yield


def are_silent(db: Database, runs: list[str]) -> bool:
    """Whether all of these have crossed a threshold of one minute."""
    silent: LiteralString = (
        "SELECT bool_and(created_at <= now() - interval '1 minute') FROM worker_runs"
        " WHERE id = ANY (%s)"
    )
    return bool(db.one(silent, runs))


async def test_what_falls_silent_while_the_sweep_holds_is_not_marked_by_it(db: Database) -> None:
    """A fleet that is cut off at once does not cross the threshold at once."""
    early = add_workers(db, 11, silent=True)
    late = add_workers(db, 9, silent=False)
    fall_silent(db, late, "57 seconds")
    with a_gate(db):
        db.do(
            "CREATE TRIGGER wait_here AFTER INSERT ON orphan_recovery.hold_runs"
            " FOR EACH STATEMENT EXECUTE FUNCTION wait_here()"
        )
        sweeping = asyncio.ensure_future(sweep(threshold_minutes=1))
        await asyncio.to_thread(db.await_lock_wait)
        await asyncio.to_thread(until, lambda: are_silent(db, late), "all to be silent")
    report = await sweeping
    assert report.is_held
    assert crashed(db).isdisjoint(early)
    assert crashed(db).isdisjoint(late), "marked by a sweep that held for the same silence"


async def test_a_fleet_that_falls_silent_after_the_look_is_left_to_the_next_sweep(
    db: Database,
) -> None:
    """The sweep saw nobody silent: it has not asked itself whether that is too much."""
    fleet = add_workers(db, 12, silent=False)
    fall_silent(db, fleet, "57 seconds")
    with a_gate(db):
        db.do(  # at the end of the transaction that looks
            "CREATE CONSTRAINT TRIGGER wait_here AFTER INSERT ON orphan_recovery.sweeps"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_here()"
        )
        sweeping = asyncio.ensure_future(sweep(threshold_minutes=1))
        await asyncio.to_thread(db.await_lock_wait)
        await asyncio.to_thread(until, lambda: are_silent(db, fleet), "all to be silent")
    assert (await sweeping).recovered == 0
    assert crashed(db) == set()
    assert (await sweep(threshold_minutes=1)).is_held


async def test_a_sweep_of_one_worker_is_no_danger_to_a_fleet(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    report = await sweep(worker=silent[3])
    assert (report.held, crashed(db)) == (None, {silent[3]})


async def test_a_dry_run_holds_nothing_and_writes_nothing(db: Database) -> None:
    add_workers(db, 12, silent=True)
    report = await sweep(dry_run=True)
    assert (report.held, report.ended_well, report.detected) == (None, True, 12)
    assert (db.sweeps(), holds(db)) == ([], [])
    await sweep()
    [before] = holds(db)
    assert (await sweep(dry_run=True)).ended_well
    assert (holds(db), len(db.sweeps())) == ([before], 1)


async def test_a_dry_run_tells_of_what_a_sweep_would_not_mark_by_a_hold_and_writes_nothing(
    db: Database,
) -> None:
    silent = add_workers(db, 12, silent=True)
    hold = (await sweep()).held
    assert hold is not None
    add_workers(db, 30, silent=False)
    db.add_run("not named", worker="another")
    before = (holds(db), approvals(db), db.sweeps(), db.verdicts())
    named = f"(hold {hold.hold_id}, which nobody has released)"
    report = await sweep(dry_run=True)
    assert (report.detected, report.held, report.ended_well) == (13, None, True)
    assert report.headline().endswith(f"HELD: 12 orphaned runs not marked {named}")
    [step] = report.next_steps()
    assert f"orphan-recovery approve {hold.hold_id} --target default" in step
    narrow = await sweep(dry_run=True, worker=silent[3])
    assert narrow.headline().endswith(f"HELD: 1 orphaned run not marked {named}")
    assert "HELD" not in (await sweep(dry_run=True, worker="another")).headline()
    assert (holds(db), approvals(db), db.sweeps(), db.verdicts()) == before
    real = await sweep()
    assert real.held is not None
    assert (real.held.hold_id, real.held.runs, real.recovered) == (hold.hold_id, 12, 1)
    await release(db, hold.hold_id)
    released = await sweep(dry_run=True)
    assert (released.detected, released.next_steps()) == (12, [])


async def test_a_dry_run_tells_of_no_hold_that_a_sweep_would_close(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    beat(db, silent[:8])
    looked = await sweep(dry_run=True)
    assert (looked.detected, looked.next_steps()) == (4, [])
    assert [hold["ended_at"] for hold in holds(db)] == [None]
    assert (await sweep()).recovered == 4


async def test_a_dry_run_needs_no_right_to_read_the_ledger(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_workers(db, 12, silent=True)
    await sweep()
    with a_role(db, "reader") as name:
        who = sql.Identifier(name)
        for grant in ("CREATE ROLE {} LOGIN", "GRANT SELECT ON worker_runs TO {}"):
            do(db, sql.SQL(grant).format(who))
        with seen_by(db, name) as reader:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", reader.url)
            first = await sweep(dry_run=True)
            do(db, sql.SQL("GRANT USAGE ON SCHEMA orphan_recovery TO {}").format(who))
            second = await sweep(dry_run=True)
    for report in (first, second):
        assert (report.error, report.detected) == (None, 12)


# While it stands


async def test_a_second_sweep_finds_the_same_hold_and_opens_no_other(db: Database) -> None:
    silent = add_workers(db, 11, silent=True)
    first, second = await sweep(), await sweep()
    assert first.held is not None
    assert second.held is not None
    assert (first.held.hold_id, first.held.is_new) == (second.held.hold_id, True)
    assert (second.held.is_new, second.held.runs, second.is_held) == (False, 11, True)
    assert second.held.evidence == first.held.evidence
    assert [hold["hold_id"] for hold in holds(db)] == [first.held.hold_id]
    assert runs_of(db, first.held.hold_id) == silent
    assert {s["hold"] for s in db.sweeps()} == {first.held.hold_id}
    assert crashed(db) == set()


async def test_orphans_outside_of_a_hold_are_marked_while_it_stands(db: Database) -> None:
    held = add_workers(db, 16, silent=True)
    live = add_workers(db, 14, silent=False)
    await sweep()
    fall_silent(db, live[:2])
    report = await sweep()
    assert crashed(db) == set(live[:2])
    assert (report.recovered, report.held and report.held.runs) == (2, 16)
    assert "2 orphaned runs detected: 2 marked crashed" in report.headline()
    [hold] = holds(db)
    assert runs_of(db, hold["hold_id"]) == held


async def test_a_second_wave_opens_a_second_hold(db: Database) -> None:
    first = add_workers(db, 16, silent=True)
    live = add_workers(db, 14, silent=False)
    await sweep()
    fall_silent(db, live[:8])
    report = await sweep()
    assert report.held is not None
    assert report.held.is_new
    assert crashed(db) == set()
    one, two = holds(db)
    assert runs_of(db, one["hold_id"]) == first
    assert runs_of(db, two["hold_id"]) == live[:8]
    assert two["hold_id"] == report.held.hold_id
    assert (two["evidence"]["silent_workers"], two["evidence"]["workers"]) == (8, 14)
    for hold in (one, two):  # a person has to hear of both, and of how much each is about
        assert str(hold["hold_id"]) in as_markdown(report)


async def test_the_rest_of_a_fleet_that_dies_is_held_too_however_few_are_left(
    db: Database,
) -> None:
    """The least sample is of the fleet: what is left beside a hold is no fleet of its own."""
    add_workers(db, 8, silent=True)
    late = add_workers(db, 7, silent=False)
    await sweep()
    fall_silent(db, late)
    report = await sweep()
    assert crashed(db) == set(), "every worker of 15 looks dead, and nobody was asked about these"
    assert report.is_held


@pytest.mark.parametrize(
    "narrow",
    [{"worker": "silent-01"}, {"tenant": "elsewhere"}, {"threshold_minutes": 240}],
    ids=str,
)
async def test_a_narrower_sweep_neither_closes_a_hold_nor_marks_what_it_names(
    db: Database, narrow: dict[str, Any]
) -> None:
    """That a part of the fleet is quiet, or all of it within four hours, is no recovery."""
    add_workers(db, 12, silent=True)
    await sweep()
    await sweep(**narrow)
    [hold] = holds(db)
    assert (hold["ended_as"], crashed(db)) == (None, set())


async def test_a_hold_of_one_target_holds_up_no_other(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "orphan-recovery.toml"
    file.write_text("[targets.one]\n[targets.two]\nthreshold_minutes = 300\n")
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(file))
    add_workers(db, 12, silent=True)
    db.add_run("for both", worker="silent-01", age="9 hours")
    assert (await sweep(target=find_target("one"))).is_held
    report = await sweep(target=find_target("two"))
    assert (report.held, crashed(db)) == (None, {"for both"})
    assert [hold["ended_as"] for hold in holds(db)] == [None]


async def test_each_target_of_a_table_has_a_hold_of_its_own(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "orphan-recovery.toml"
    file.write_text("[targets.one]\n[targets.two]\n")
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(file))
    silent = add_workers(db, 12, silent=True)
    for name in ("one", "two"):
        assert (await sweep(target=find_target(name))).is_held
    one, two = holds(db)
    assert (one["target"], two["target"]) == ("one", "two")
    assert runs_of(db, one["hold_id"]) == runs_of(db, two["hold_id"]) == silent
    await release(db, one["hold_id"])
    assert (await sweep(target=find_target("two"))).is_held
    assert crashed(db) == set()
    assert (await sweep(target=find_target("one"))).recovered == 12


async def test_two_sweeps_at_once_open_one_hold(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    db.do(
        "CREATE FUNCTION wait_here() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NEW; END $$;"
        "CREATE TRIGGER wait_here BEFORE INSERT ON orphan_recovery.holds"
        " FOR EACH ROW EXECUTE FUNCTION wait_here()"
    )
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(42)")
        sweeps = asyncio.gather(sweep(), sweep())
        await asyncio.to_thread(db.await_lock_wait, 2)
    one, two = await sweeps
    assert (one.error, two.error, crashed(db)) == (None, None, set())
    assert one.held is not None
    assert two.held is not None
    [hold] = holds(db)
    assert one.held.hold_id == two.held.hold_id == hold["hold_id"]
    assert sorted([one.held.is_new, two.held.is_new]) == [False, True]
    assert runs_of(db, hold["hold_id"]) == silent


# Approval


async def test_an_approval_releases_the_runs_of_its_hold_and_no_others(db: Database) -> None:
    first = add_workers(db, 16, silent=True)
    live = add_workers(db, 14, silent=False)
    await sweep()
    fall_silent(db, live[:8])
    await sweep()
    one, two = holds(db)
    await release(db, one["hold_id"])
    report = await sweep()
    assert crashed(db) == set(first)
    assert report.held is not None
    assert (report.held.hold_id, report.held.runs) == (two["hold_id"], 8)
    assert [hold["ended_as"] for hold in holds(db)] == [None, None]


async def test_a_released_fleet_is_marked_and_its_hold_closed_by_the_next_sweep(
    db: Database,
) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    [hold] = holds(db)
    await release(db, hold["hold_id"], note="rack on fire")
    report = await sweep()
    assert (report.ended_well, report.recovered, crashed(db)) == (True, 12, set(silent))
    last = await sweep()
    assert last.ended_well
    [closed] = holds(db)
    assert (closed["ended_as"], closed["ended_by"]) == ("released", last.request.sweep_id)
    [approval] = approvals(db)
    assert (approval["approved_by"], approval["note"]) == ("a person", "rack on fire")
    assert {v["outcome"] for v in db.verdicts()} == {"marked"}


async def test_a_run_of_a_hold_that_beat_meanwhile_is_left_alone_after_the_approval(
    db: Database,
) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    [hold] = holds(db)
    await release(db, hold["hold_id"])
    beat(db, silent[:2])
    db.do("UPDATE worker_runs SET status = 'completed' WHERE id = %s", silent[2])
    await sweep()
    assert crashed(db) == set(silent[3:])


async def test_an_approval_releases_no_run_that_was_heard_of_since_its_hold(db: Database) -> None:
    """It may be another attempt, of another worker, about whose death nobody was asked."""
    runs = add_workers(db, 12, silent=True)
    held = (await sweep()).held
    assert held is not None
    await release(db, held.hold_id)
    db.do("ALTER TABLE orphan_recovery.holds DISABLE TRIGGER USER")
    db.do("UPDATE orphan_recovery.holds SET opened_at = now() - interval '90 minutes'")
    db.do(
        "UPDATE worker_runs SET heartbeat_at = now() - interval '1 hour', worker_id = 'new-' || id"
    )
    again = (await sweep()).held
    assert again is not None
    assert again.hold_id != held.hold_id
    assert runs_of(db, again.hold_id) == sorted(runs)
    assert crashed(db) == set()


async def test_an_approval_expires_by_the_databases_time(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    [hold] = holds(db)
    _, expires_at = await release(db, hold["hold_id"], lasting=timedelta(seconds=0.3))
    expired: LiteralString = "SELECT statement_timestamp() >= %s"
    await asyncio.to_thread(until, lambda: bool(db.one(expired, expires_at)), "the end of it")
    report = await sweep()
    assert report.is_held
    assert crashed(db) == set()
    await release(db, hold["hold_id"], lasting=timedelta(minutes=5))
    [_, second] = approvals(db)
    assert second["expires_at"] - second["approved_at"] == timedelta(minutes=5)
    await sweep()
    assert crashed(db) == set(silent)


async def test_an_approval_that_expires_in_mid_sweep_ends_it_as_held(db: Database) -> None:
    """What it did not come to is under the hold again, and the sweep says so."""
    add_workers(db, 16, silent=True)
    slow = Target(orphans_per_second=5)
    await sweep(target=slow)
    [hold] = holds(db)
    await release(db, hold["hold_id"], lasting=timedelta(seconds=1))
    report = await sweep(target=slow)
    marked = len(crashed(db))
    assert marked < 16
    assert (report.recovered, report.is_held) == (marked, True)
    assert report.held is not None
    assert (report.held.hold_id, report.held.runs) == (hold["hold_id"], 16 - marked)
    [*_, told] = db.sweeps()
    assert (told["ended_as"], told["hold"]) == ("held", hold["hold_id"])
    # Of a fleet of less than the least sample, and all of it silent.
    assert (await sweep(target=slow)).is_held
    assert len(crashed(db)) == marked


async def test_a_hold_tells_of_the_last_sweep_before_the_one_that_looked_twice(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Another may have ended while that one waited to look again."""
    caplog.set_level("INFO", "orphan_recovery")
    add_workers(db, 12, silent=True, age="5 hours", beat="2 hours")
    ended_in_the_ledger(db, ago="3 hours")
    sweeping = asyncio.ensure_future(sweep(target=Target(name="default", heartbeat_seconds=1)))
    await asyncio.to_thread(
        until, lambda: "sweep_looks_twice" in caplog.messages, "it says that it looks twice"
    )
    ended_in_the_ledger(db, ago="1 second")
    report = await sweeping
    assert (report.is_held, bool(report.looked_twice)) == (True, True)
    assert db.one(
        "SELECT now() - (evidence ->> 'last_sweep_at')::timestamptz FROM orphan_recovery.holds"
    ) > timedelta(hours=2)


async def test_a_hold_does_not_end_because_the_fleet_becomes_smaller(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    db.do("UPDATE worker_runs SET status = 'failed' WHERE id = ANY (%s)", silent[:3])
    report = await sweep()
    assert report.held is not None
    assert (report.held.runs, crashed(db)) == (9, set())
    assert [hold["ended_at"] for hold in holds(db)] == [None]
    beat(db, silent[3:8])  # of 9 more than the half is back
    assert (await sweep()).recovered == 4
    assert [hold["ended_as"] for hold in holds(db)] == ["recovered"]


async def test_a_hold_of_which_nothing_is_left_ends_whoever_else_is_silent(db: Database) -> None:
    held = add_workers(db, 12, silent=True)
    await sweep()
    db.do("UPDATE worker_runs SET status = 'failed' WHERE id = ANY (%s)", held)
    others = add_workers(db, 2, silent=True, first=13)
    assert (await sweep()).recovered == 2
    assert crashed(db) == set(others)
    assert [hold["ended_as"] for hold in holds(db)] == ["recovered"]


async def test_a_hold_does_not_end_because_new_workers_come(db: Database) -> None:
    """They prove nothing about those that were there."""
    add_workers(db, 12, silent=True)
    add_workers(db, 8, silent=False)
    await sweep()
    add_workers(db, 40, silent=False, first=9)
    assert (await sweep()).is_held
    assert crashed(db) == set()
    assert [hold["ended_at"] for hold in holds(db)] == [None]


async def test_of_several_holds_the_largest_fleet_counts(db: Database) -> None:
    """What stays silent when it is back is more than the share of a smaller one, held before."""
    silent = add_workers(db, 12, silent=True)
    await sweep()
    silent += add_workers(db, 28, silent=True, first=13)
    await sweep()
    assert [hold["evidence"]["workers"] for hold in holds(db)] == [12, 28]
    beat(db, silent[8:])
    assert (await sweep()).recovered == 8
    assert [hold["ended_as"] for hold in holds(db)] == ["recovered"] * 2


async def test_a_fleet_that_is_back_closes_the_hold_and_nothing_was_marked(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    beat(db, silent)
    report = await sweep()
    assert (report.ended_well, report.held, crashed(db)) == (True, None, set())
    [hold] = holds(db)
    assert (hold["ended_as"], hold["ended_by"]) == ("recovered", report.request.sweep_id)


async def test_what_stays_silent_when_the_fleet_is_back_is_marked(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    beat(db, silent[2:])
    report = await sweep()
    assert (report.ended_well, crashed(db)) == (True, set(silent[:2]))
    assert [hold["ended_as"] for hold in holds(db)] == ["recovered"]


async def test_an_approval_that_ran_out_unused_did_not_release_the_fleet_that_came_back(
    db: Database,
) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    [hold] = holds(db)
    db.do(
        "INSERT INTO orphan_recovery.approvals (hold_id, approved_at, expires_at, approved_by)"
        " VALUES (%s, now() - interval '2 hours', now() - interval '1 hour', 'a person')",
        hold["hold_id"],
    )
    beat(db, silent)
    await sweep()
    assert [hold["ended_as"] for hold in holds(db)] == ["recovered"]
    assert crashed(db) == set()


def test_the_command_takes_as_much_of_an_id_as_is_unique(db: Database) -> None:
    one = plant_hold(db, "aaaa0000-0000-4000-8000-000000000001")
    two = plant_hold(db, "aaaa1111-0000-4000-8000-000000000002")
    closed = plant_hold(db, "bbbb0000-0000-4000-8000-000000000003")
    db.do(
        "UPDATE orphan_recovery.holds SET ended_at = now(), ended_as = 'recovered',"
        " ended_by = sweep_id WHERE hold_id = %s",
        closed,
    )
    for asked, told in {
        "aaaa": "more than one open hold begins with 'aaaa'",
        "cccc": "no open hold begins with 'cccc'",
        closed: "One that is closed needs no approval",
        "": f"name a hold; open are: {one} of target 'default', {two} of target 'default'.",
        "%": "no open hold begins with '%'",
    }.items():
        refused = run("orphan-recovery", "approve", asked)
        assert (refused.returncode, refused.stdout) == (2, ""), asked
        assert told in refused.stderr
        assert one in refused.stderr
        assert two in refused.stderr
    unnamed = run("orphan-recovery", "approve")
    assert (unnamed.returncode, unnamed.stdout) == (2, "")
    assert f"name a hold; open are: {one}" in unnamed.stderr
    assert approvals(db) == []

    done = run("orphan-recovery", "approve", "AAAA1", "--minutes", "5", "--note", "rack on fire")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"hold {two} is released until ")
    [approval] = approvals(db)
    assert (str(approval["hold_id"]), approval["note"]) == (two, "rack on fire")
    assert approval["expires_at"] - approval["approved_at"] == timedelta(minutes=5)
    assert " on " in approval["approved_by"]
    assert db.one("SELECT now() - %s BETWEEN '0' AND '1 minute'", approval["approved_at"])

    again = run("orphan-recovery", "approve", "aaaa1", "--minutes", "1").stdout
    until = iso(approval["expires_at"])
    told = f"hold {two} stays released until {until}: an approval is never made shorter; "
    assert again.startswith(told)
    longer = run("orphan-recovery", "approve", "aaaa1", "--minutes", "9").stdout
    latest = iso(approvals(db)[-1]["expires_at"])
    assert f"until {until}, and now is released until {latest}; none of its runs" in longer
    other = run("orphan-recovery", "approve", "aaaa0").stdout
    assert other.startswith(f"hold {one} is released until "), "each hold by itself"

    assert run("orphan-recovery", "approve", "aaaa0", "--minutes", "0").returncode == 2
    too_long = run("orphan-recovery", "approve", "aaaa0", "--minutes", "9" * 15)
    assert (too_long.returncode, "Traceback" in too_long.stderr) == (2, False)
    assert len(approvals(db)) == 4


@pytest.fixture
def three(db: Database, blank: Database, tmp_path: Path) -> dict[str, str]:
    """The environment of three targets: two of one database, and one of another without one."""
    file = tmp_path / "targets.toml"
    file.write_text(
        '[targets.dj]\ndatabase_url_env = "DJ_DB"\n[targets.uu]\ndatabase_url_env = "DJ_DB"\n'
        'table = "other_runs"\n[targets.ck]\ndatabase_url_env = "CK_DB"\n'
    )
    return {"ORPHAN_RECOVERY_CONFIG": str(file), "DJ_DB": db.url, "CK_DB": blank.url}


def test_without_a_target_a_hold_is_looked_for_in_the_ledgers_of_all(
    db: Database, blank: Database, three: dict[str, str]
) -> None:
    migrated = run("orphan-recovery", "migrate", "--target", "ck", **three)
    assert migrated.returncode == 0, migrated.stderr
    here = plant_hold(db, "aaaa0000-0000-4000-8000-000000000001", target="uu")
    there = plant_hold(blank, "aaaa1111-0000-4000-8000-000000000002", target="ck")
    for asked, told in {
        "aaaa": "more than one open hold begins with 'aaaa'",
        "cccc": "no open hold begins with 'cccc'",
    }.items():
        refused = run("orphan-recovery", "approve", asked, **three)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"{told}; open are: {here} of target 'uu', {there} of target 'ck'." in refused.stderr
    assert approvals(db) == approvals(blank) == []

    for asked, hold, target, database in (("aaaa0", here, "uu", db), ("aaaa1", there, "ck", blank)):
        done = run("orphan-recovery", "approve", asked, **three)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"hold {hold} of target '{target}' is released until ")
        assert [str(told["hold_id"]) for told in approvals(database)] == [hold]


def test_a_ledger_that_cannot_be_asked_keeps_no_hold_of_another_from_being_released(
    db: Database, three: dict[str, str]
) -> None:
    hold = plant_hold(db, "aaaa0000-0000-4000-8000-000000000001", target="uu")
    nowhere = {**three, "CK_DB": f"postgresql://me:S3cret@127.0.0.1:{free_port()}/nowhere"}
    done = run("orphan-recovery", "approve", hold, **nowhere)
    assert done.returncode == 0
    assert done.stdout.startswith(f"hold {hold} of target 'uu' is released until ")
    assert "the ledger of target 'ck' was not asked (OperationalError: connection" in done.stderr
    assert "S3cret" not in done.stderr
    missed = run("orphan-recovery", "approve", "bbbb", **nowhere)
    assert (missed.returncode, missed.stdout) == (1, ""), "it may be there"
    assert f"no open hold begins with 'bbbb'; open are: {hold} of target 'uu'." in missed.stderr
    assert "the ledger of target 'ck' was not asked" in missed.stderr
    unset = run("orphan-recovery", "approve", "bbbb", **{**three, "CK_DB": ""})
    assert unset.returncode == 1
    assert "the ledger of target 'ck' was not asked (target 'ck' takes its data" in unset.stderr
    assert "run `orphan-recovery migrate`" in run("orphan-recovery", "approve", "b", **three).stderr


def test_a_hold_of_which_nothing_is_in_flight_any_more_leaves_nothing_to_mark(
    db: Database,
) -> None:
    hold = plant_hold(db, "aaaa0000-0000-4000-8000-000000000001")
    for name in ("one", "two"):
        db.add_run(name)
        db.do("INSERT INTO orphan_recovery.hold_runs VALUES (%s, %s)", hold, name)
    db.do("UPDATE worker_runs SET status = 'failed', success = false WHERE id = 'one'")
    some = run("orphan-recovery", "approve", hold).stdout
    assert some.endswith("; the next sweep marks those of its runs that are silent still\n")
    db.do("UPDATE worker_runs SET status = 'failed', success = false WHERE id = 'two'")
    none = run("orphan-recovery", "approve", hold).stdout
    assert none.endswith("; none of its runs is in flight any more: nothing is left to mark\n")


@pytest.mark.parametrize("unknown", [OSError, KeyError, ImportError])
def test_a_user_without_a_name_may_approve(
    monkeypatch: pytest.MonkeyPatch, unknown: type[Exception]
) -> None:
    """Each version of Python tells it in its own way."""

    def nobody() -> str:
        raise unknown("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert cli._person() == f"user {os.getuid()} on {socket.gethostname()}"


async def test_there_is_nothing_to_approve_where_nothing_is_held(db: Database) -> None:
    with pytest.raises(ConfigurationError, match="no hold is open: nothing is to be approved"):
        await release(db, UUID(int=7))


# What else may be amiss


async def test_a_mark_that_fails_beside_a_hold_is_the_worse_news(db: Database) -> None:
    add_workers(db, 16, silent=True)
    live = add_workers(db, 14, silent=False)
    await sweep()
    fall_silent(db, live[:1])
    db.poison(live[0])
    done = await asyncio.to_thread(run, "orphan-recovery", "sweep")
    assert done.returncode == 1
    assert "HELD: 16 of 30 workers" in done.stdout
    assert "1 FAILED" in done.stdout
    told = db.sweeps()[-1]
    assert (told["ended_as"], told["hold"]) == ("failed", holds(db)[0]["hold_id"])


@pytest.fixture
def two_targets(
    server: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Database]]:
    """Two targets with a database each; the first has too much to be believed."""
    file = tmp_path / "orphan-recovery.toml"
    file.write_text(
        '[targets.one]\ndatabase_url_env = "ONE"\n[targets.two]\ndatabase_url_env = "TWO"\n'
    )
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(file))
    with (
        database_of_its_own(server, template) as url_1,
        database_of_its_own(server, template) as url_2,
        Database(url_1) as one,
        Database(url_2) as two,
    ):
        monkeypatch.setenv("ONE", url_1)
        monkeypatch.setenv("TWO", url_2)
        add_workers(one, 12, silent=True)
        add_workers(two, 2, silent=True)
        yield [one, two]


def test_of_all_targets_one_held_is_held_and_one_failed_is_failed(
    two_targets: list[Database],
) -> None:
    one, two = two_targets
    held = run("orphan-recovery", "sweep", "--all-targets")
    assert held.returncode == 3
    assert "HELD: 12 of 12 workers look dead" in held.stdout
    assert "two: 2 orphaned runs detected: 2 marked crashed" in held.stdout
    assert (crashed(one), len(crashed(two))) == (set(), 2)
    [poisoned] = add_workers(two, 1, silent=True, first=7)
    two.poison(poisoned)
    assert run("orphan-recovery", "sweep", "--all-targets").returncode == 1


# The ledger


REFUSED: tuple[LiteralString, ...] = (
    "UPDATE orphan_recovery.hold_runs SET run_id = 'another'",
    "DELETE FROM orphan_recovery.hold_runs",
    "TRUNCATE orphan_recovery.hold_runs",
    "UPDATE orphan_recovery.approvals SET expires_at = 'infinity'",
    "DELETE FROM orphan_recovery.approvals",
    "TRUNCATE orphan_recovery.approvals",
    "DELETE FROM orphan_recovery.holds",
    "TRUNCATE orphan_recovery.holds CASCADE",
    "UPDATE orphan_recovery.holds SET evidence = '{}'",
    "UPDATE orphan_recovery.holds SET opened_at = now()",
    "UPDATE orphan_recovery.holds SET ended_by = sweep_id",
    "UPDATE orphan_recovery.holds SET ended_at = now(), ended_as = 'recovered', target = 'x'",
)


async def test_holds_and_approvals_are_append_only_for_everybody(db: Database) -> None:
    add_workers(db, 12, silent=True)
    await sweep()
    [hold] = holds(db)
    await release(db, hold["hold_id"])
    before = (holds(db), runs_of(db, hold["hold_id"]), approvals(db))
    for statement in REFUSED:
        with pytest.raises(psycopg.errors.RaiseException, match="LEDGER_VIOLATION"):
            db.do(statement)
    assert (holds(db), runs_of(db, hold["hold_id"]), approvals(db)) == before


async def test_a_hold_is_closed_once(db: Database) -> None:
    silent = add_workers(db, 12, silent=True)
    await sweep()
    beat(db, silent)
    await sweep()
    [closed] = holds(db)
    for statement in (
        "UPDATE orphan_recovery.holds SET ended_as = 'released'",
        "UPDATE orphan_recovery.holds SET ended_at = NULL, ended_as = NULL",
        "UPDATE orphan_recovery.holds SET ended_at = now()",
    ):
        with pytest.raises(psycopg.errors.RaiseException, match="may be closed once"):
            db.do(statement)
    assert holds(db) == [closed]


async def test_the_role_that_sql_prints_suffices_to_hold_release_and_close(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = add_workers(db, 12, silent=True)
    with a_role(db) as name:
        psql(db, printed(db, Target(), name))
        with seen_by(db, name) as role:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", role.url)
            report = await sweep()
            assert (report.error, report.is_held) == (None, True)
            assert (await sweep()).is_held
            [hold] = holds(db)
            await release(role, hold["hold_id"])
            report = await sweep()
            assert (report.error, crashed(db)) == (None, set(silent))
            report = await sweep()
            assert (report.error, report.ended_well) == (None, True)
            assert [hold["ended_as"] for hold in holds(db)] == ["released"]
