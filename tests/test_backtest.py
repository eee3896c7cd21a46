"""The backtest: what other thresholds would have crashed, in exact numbers on planted runs."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString

import pytest
from psycopg import sql
from rich.console import Console
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.alive import RunLost, finish_run
from orphan_recovery.backtest import measure as backtest
from orphan_recovery.backtest.flow import backtest_thresholds
from orphan_recovery.backtest.measure import FEW, LADDER, AtThreshold, Backtest, backtest_target
from orphan_recovery.backtest.report import as_dict, as_markdown, headline, notes, plot, show
from orphan_recovery.database import database_url
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Columns, Elsewhere, Rule, Target
from prefect_support import Api, flow_run_of
from sql_support import a_role, seen_by
from support import Database, database_of_its_own, free_port
from tables_support import configure, do, set_for_all

NOT_KNOWN = (
    "nothing is known to be wrong (a lower bound, since runs beat; `doctor` says what heartbeats "
    "and the schedule ask for)"
)
"""What is said of thresholds that would have crashed no run, where a beat wipes out the last."""
COMMAND = Path(sys.executable).with_name("orphan-recovery")


def finished(
    db: Database,
    run_id: str,
    silence: str,
    *,
    task: str | None = "report",
    status: str = "completed",
    ended: str = "1 day",
    waited: str = "0",
    beat: bool = True,
) -> str:
    """A run that ended so long ago, silent for so long before it, and so long before its start."""
    db.do(
        "INSERT INTO worker_runs (id, status, task, worker_id, tenant_id, created_at, started_at,"
        " heartbeat_at, completed_at) SELECT %s, %s, %s, 'w', 't', s - w::interval, s,"
        " CASE WHEN %s THEN e - %s::interval END, e"
        " FROM (SELECT now() - %s::interval AS e, %s AS w) AS x,"
        " LATERAL (SELECT e - %s::interval - CASE WHEN %s THEN interval '1 s' ELSE '0' END)"
        " AS y(s)",
        *(run_id, status, task, beat, silence, ended, waited, silence, beat),
    )
    return run_id


def verdict(
    db: Database,
    run_id: str,
    silence: str,
    outcome: str = "marked",
    *,
    target: str = "default",
    task: str | None = "report",
    status: str = "running",
    ago: str = "1 day",
    found: str | None = None,
    reported: str | None = None,
    rule: str = "silence >= threshold",
) -> str:
    """A verdict of the ledger, given so long ago; contested so long after it, if at all."""
    db.do(
        "WITH s AS (INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by,"
        " reason, threshold, scope, version, opened_at) VALUES (gen_random_uuid(), %s, 't', 'test',"
        " 'r', '1 min', '{}', '0', now() - %s::interval) RETURNING sweep_id),"
        " v AS (INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome, task,"
        " status_seen, sign_of_life, evidence, silence, threshold, rule, reason, judged_at, found)"
        " SELECT sweep_id, %s, %s, %s, %s, %s, now() - %s::interval - %s::interval, 'age', %s,"
        " '1 min', %s, 'r', now() - %s::interval, %s FROM s)"
        " INSERT INTO orphan_recovery.contests SELECT sweep_id, %s, %s, 'w', 'completed',"
        " now() - %s::interval + %s::interval FROM s WHERE %s",
        *(
            target,
            ago,
            run_id,
            target,
            outcome,
            task,
            status,
            ago,
            silence,
            silence,
            rule,
            ago,
            found,
        ),
        *(run_id, target, ago, reported, reported is not None),
    )
    return run_id


async def replayed(
    target: Target | None = None, *thresholds: int, days: int = 30
) -> tuple[Backtest, dict[int, AtThreshold]]:
    tested = await backtest_target(target or Target(), thresholds or None, days)
    return tested, {at.minutes: at for at in tested.at}


def crashed(at: dict[int, AtThreshold]) -> dict[int, int]:
    return {minutes: one.crashed for minutes, one in at.items()}


def tasks(at: AtThreshold) -> list[tuple[str | None, int]]:
    return [(one.task, one.runs) for one in at.tasks]


def many(db: Database, count: int, silence: str = "10 s", **given: Any) -> None:
    for n in range(count):
        finished(db, f"many-{silence}-{n}", silence, **given)


# What the table shows


async def test_each_threshold_counts_the_finished_runs_that_were_silent_for_it(
    db: Database,
) -> None:
    many(db, 20)
    for n in range(7):
        finished(db, f"a{n}", "16 minutes", task="a")
    for n in range(5):
        finished(db, f"b{n}", "39 minutes", task="b", status="failed")
    tested, at = await replayed(Target(threshold_minutes=15), 10, 15, 16, 17, 39, 40)
    assert crashed(at) == {10: 12, 15: 12, 16: 12, 17: 5, 39: 5, 40: 0}
    assert tasks(at[15]) == [("a", 7), ("b", 5)]
    assert tasks(at[17]) == [("b", 5)]
    assert tasks(at[40]) == []
    assert (tested.finished, tested.replayed, tested.beaten) == (32, 32, 32)
    assert tested.longest == timedelta(minutes=39)
    assert tested.least_safe is at[40]
    assert tested.later(at[40]) == 25
    assert headline(tested) == (
        "15 min (now) would have crashed 12 of 32 runs that finished, in tasks a and b; of 40 min "
        f"and longer {NOT_KNOWN}: recovery would have come 25 min later"
    )


async def test_a_silence_as_long_as_the_threshold_is_one_and_a_shorter_one_is_not(
    db: Database,
) -> None:
    finished(db, "exactly", "10 minutes")
    finished(db, "almost", "9 minutes 59.999999 seconds")
    _, at = await replayed(None, 10)
    assert at[10].crashed == 1


async def test_without_a_beat_the_silence_is_the_whole_run_from_its_start(db: Database) -> None:
    finished(db, "slow", "50 minutes", waited="10 minutes", beat=False)
    db.do(
        "INSERT INTO worker_runs (id, status, created_at, completed_at)"
        " VALUES ('never begun', 'failed', now() - interval '55 minutes', now())"
    )
    tested, at = await replayed(None, 50, 51, 56)
    assert crashed(at) == {30: 2, 50: 2, 51: 1, 56: 0}
    assert tested.beaten == 0


async def test_without_being_asked_it_replays_the_ladder_and_the_targets_own(db: Database) -> None:
    _, at = await replayed(Target(threshold_minutes=45))
    assert list(at) == sorted([*LADDER, 45])
    _, at = await replayed(Target(threshold_minutes=45), 60, 5, 60)
    assert list(at) == [5, 45, 60]


async def test_what_shows_no_silence_is_left_out_counted_and_told(db: Database) -> None:
    finished(db, "good", "2 hours")
    for n in range(2):
        finished(db, f"no end {n}", "2 hours", ended="400 days")
    db.do("ALTER TABLE worker_runs DISABLE TRIGGER USER")
    db.do("UPDATE worker_runs SET completed_at = NULL WHERE id LIKE 'no end%'")
    finished(db, "ahead", "2 hours", ended="-1 hour")
    finished(db, "infinitely ahead", "2 hours")
    db.do("UPDATE worker_runs SET completed_at = 'infinity' WHERE id LIKE 'inf%'")
    finished(db, "beat at its end", "0", waited="2 hours")
    finished(db, "beat after its end", "-1 second")
    finished(db, "beat for ever", "2 hours")
    db.do("UPDATE worker_runs SET heartbeat_at = 'infinity' WHERE id = 'beat for ever'")
    finished(db, "no sign", "2 hours")
    db.do(
        "UPDATE worker_runs SET created_at = '-infinity', started_at = NULL, heartbeat_at = NULL"
        " WHERE id = 'no sign'"
    )
    tested, at = await replayed(None, 60)
    assert at[60].crashed == 1
    assert (tested.finished, tested.replayed) == (9, 1)
    assert (tested.without_end, tested.end_ahead) == (2, 2)
    assert (tested.without_sign, tested.overwritten) == (1, 3)
    assert notes(tested)[-1] == (
        "Left out, for they show no silence: 2 without a time of their end (of all times), 2 with "
        "an end in the database's future, 1 without any sign of life, 3 whose last sign of life "
        "is their end or comes after it."
    )


async def test_a_run_that_was_made_and_done_at_one_instant_was_not_silent(db: Database) -> None:
    finished(db, "instant", "0", beat=False)
    tested, at = await replayed(None, 1)
    assert (tested.replayed, at[1].crashed, tested.longest) == (1, 0, timedelta(0))


async def test_runs_in_flight_and_runs_that_crashed_do_not_count(db: Database) -> None:
    finished(db, "crashed", "2 hours", status="crashed")
    finished(db, "running", "2 hours", status="running")
    finished(db, "done", "2 hours")
    _, at = await replayed(None, 60)
    assert at[60].crashed == 1


async def test_only_so_many_days_before_the_databases_now_count(db: Database) -> None:
    finished(db, "old", "2 hours", ended="7 days 1 minute")
    finished(db, "new", "2 hours", ended="6 days 23 hours")
    verdict(db, "old verdict", "2 hours", ago="8 days", reported="1 s")
    verdict(db, "new verdict", "2 hours", ago="6 days", reported="1 s")
    verdict(db, "old death", "40 minutes", ago="8 days")
    for days, runs, deaths in ((7, 2, 0), (8, 3, 0), (9, 4, 1)):
        tested, at = await replayed(None, 60, days=days)
        assert (at[60].crashed, tested.deaths) == (runs, deaths)


async def test_a_backlog_is_silent_where_a_run_that_waits_is_in_flight(db: Database) -> None:
    finished(db, "waited", "1 minute", waited="20 minutes")
    finished(db, "waited and was silent", "25 minutes", waited="25 minutes")
    tested, at = await replayed(None, 15, 21)
    assert {m: (one.crashed, one.waiting) for m, one in at.items()} == {
        15: (2, 1),
        21: (1, 0),
        30: (0, 0),
    }
    assert any("1 at 15 min" in note and "waited to be started" in note for note in notes(tested))
    for elsewhere in (
        Target(in_flight=("running",)),
        Target(in_flight=("running", "ending"), waiting=("queued",)),
    ):
        _, at = await replayed(elsewhere, 15)
        assert (at[15].crashed, at[15].waiting) == (1, 0)


async def test_the_five_tasks_with_most_runs_are_named_and_the_rest_counted(db: Database) -> None:
    for number in range(1, 8):
        for n in range(number):
            finished(db, f"{number}-{n}", "1 hour", task=f"task {number}")
    for n in range(6):
        finished(db, f"none-{n}", "1 hour", task=None)
    tested, at = await replayed(None, 60)
    assert tasks(at[60]) == [
        *(("task 7", 7), ("task 6", 6), (None, 6), ("task 5", 5), ("task 4", 4))
    ]
    assert at[60].crashed == 34
    assert "in tasks task 7, task 6, (no task) and others;" in headline(tested)
    assert "task 7 7, task 6 6, (no task) 6, task 5 5, task 4 4, others 6" in as_markdown(tested)


# Rules


async def test_a_run_under_a_rule_has_its_threshold_and_is_told_apart(db: Database) -> None:
    finished(db, "plain", "50 minutes", task="quick")
    for minutes in (50, 70):
        finished(db, f"long-{minutes}", f"{minutes} minutes", task="long-report")
    finished(db, "never", "9 hours", task="replay")
    target = Target(
        rules=(
            Rule(match={"task": "l_ng%"}, never=True),  # nothing is wild in it
            Rule(match={"task": "long-*", "tenant_id": "t"}, threshold_minutes=60),
            Rule(match={"task": "replay"}, never=True),
            Rule(match={"task": "*"}, threshold_minutes=40),
        )
    )
    tested, at = await replayed(target)
    assert set(crashed(at).values()) == {0}
    assert tested.replayed == 0
    assert [(r.runs, r.crashed, r.longest) for r in tested.rules] == [
        (0, 0, None),
        (2, 1, timedelta(minutes=70)),
        (1, 0, timedelta(hours=9)),
        (1, 1, timedelta(minutes=50)),
    ]
    assert headline(tested).endswith("; the rules' own thresholds would have crashed 2 runs")
    tested, at = await replayed(Target(rules=target.rules[:3]))
    assert (at[30].crashed, at[60].crashed, tested.replayed) == (1, 0, 1)


async def test_a_rule_for_a_status_is_held_against_the_status_the_run_had_then(
    db: Database,
) -> None:
    finished(db, "run", "50 minutes", waited="90 minutes")
    queued = Rule(match={"status": "que?ed"}, threshold_minutes=120)
    running = Rule(match={"status": "running"}, threshold_minutes=45)
    ended = Rule(match={"status": "completed"}, never=True)
    tested, at = await replayed(Target(rules=(ended, queued)), 60)
    assert crashed(at) == {30: 1, 60: 0}
    assert [(r.runs, r.crashed) for r in tested.rules] == [(0, 0), (1, 0)]
    tested, at = await replayed(Target(rules=(running,)), 60)
    assert (at[60].crashed, at[60].waiting) == (1, 1)
    assert [(r.runs, r.crashed, r.longest) for r in tested.rules] == [(1, 1, timedelta(minutes=50))]


async def test_the_ledgers_runs_come_under_the_rules_too(db: Database) -> None:
    verdict(db, "ruled", "50 minutes", task="long", reported="1 s")
    verdict(db, "ruled death", "50 minutes", task="long")
    verdict(db, "queued death", "50 minutes", status="queued")
    verdict(db, "plain", "50 minutes", task="short", reported="1 s")
    verdict(db, "plain death", "50 minutes", task="short")
    rules = (
        Rule(match={"task": "long"}, threshold_minutes=45),
        Rule(match={"status": "queued"}, threshold_minutes=45),
    )
    tested, at = await replayed(Target(rules=rules), 60)
    assert [(r.runs, r.crashed) for r in tested.rules] == [(1, 1), (0, 0)]
    assert (tested.replayed, at[30].crashed, at[30].contested) == (1, 1, 1)
    assert (tested.deaths, at[60].deaths_later) == (1, 1)


# The ledger


async def test_a_contested_verdict_and_an_escape_are_runs_that_lived_at_that_silence(
    db: Database,
) -> None:
    verdict(db, "contested", "35 minutes", reported="1 second", task="frozen")
    verdict(db, "beat again", "45 minutes", "sign_of_life")
    verdict(db, "finished", "55 minutes", "finished_first", found='{"status": "completed"}')
    verdict(db, "ended by hand", "55 minutes", "finished_first", found='{"status": "crashed"}')
    for outcome in ("changed_hands", "vanished", "already_marked", "failed"):
        verdict(db, outcome, "55 minutes", outcome)
    verdict(db, "another target's", "3 hours", "sign_of_life", target="billing")
    tested, at = await replayed(None, 40, 50, 60)
    assert {m: (one.crashed, one.contested, one.escaped) for m, one in at.items()} == {
        30: (3, 1, 2),
        40: (2, 0, 2),
        50: (1, 0, 1),
        60: (0, 0, 0),
    }
    assert tasks(at[30]) == [("report", 2), ("frozen", 1)]
    assert (tested.finished, tested.only_in_ledger, tested.deaths) == (0, 3, 0)
    assert tested.least_safe is at[60]


async def test_a_run_that_table_and_ledger_both_tell_of_counts_once_by_its_longest_silence(
    db: Database,
) -> None:
    finished(db, "run", "10 seconds")  # its later beats wiped out what the ledger remembers
    verdict(db, "run", "35 minutes", "sign_of_life")
    verdict(db, "run", "45 minutes", "sign_of_life")
    finished(db, "other", "50 minutes")
    verdict(db, "other", "35 minutes", "finished_first", found='{"status": "completed"}')
    tested, at = await replayed(None, 46, 60)
    assert crashed(at) == {30: 2, 46: 1, 60: 0}
    assert (tested.replayed, tested.only_in_ledger) == (2, 0)


async def test_how_long_a_contested_run_was_silent_in_all_is_told_apart_and_not_called_safe(
    db: Database,
) -> None:
    verdict(db, "frozen", "31 minutes", reported="2 hours")
    tested, at = await replayed(None, 31, 60, 151, 152)
    assert {m: (one.crashed, one.perhaps) for m, one in at.items()} == {
        30: (1, 0),
        31: (1, 0),
        60: (0, 1),
        151: (0, 1),
        152: (0, 0),
    }
    assert tested.least_safe is at[152]
    assert any("1 at 60 min, 1 at 151 min" in note for note in notes(tested))


async def test_deaths_that_a_longer_threshold_would_have_kept_waiting_are_counted(
    db: Database,
) -> None:
    for minutes in (31, 33, 59, 60, 100):
        verdict(db, f"dead-{minutes}", f"{minutes} minutes")
    verdict(db, "contested", "31 minutes", reported="1 second")
    verdict(db, "not by silence", "1 minute", rule="its worker is back")
    many(db, 20)
    tested, at = await replayed(None, 15, 60, 120)
    assert tested.deaths == 5
    assert {m: one.deaths_later for m, one in at.items()} == {15: 0, 30: 0, 60: 3, 120: 5}
    assert headline(tested).endswith(
        f"of 60 min and longer {NOT_KNOWN}: recovery would have come 30 min later, and 3 of 5 "
        "deaths would have waited longer"
    )


async def test_a_contest_is_of_one_verdict_and_not_of_another_on_the_same_run(
    db: Database,
) -> None:
    verdict(db, "twice", "70 minutes")  # put back in its own row, and marked again
    verdict(db, "twice", "40 minutes", reported="1 second")
    tested, at = await replayed(None, 40, 60)
    assert (tested.deaths, crashed(at)) == (1, {30: 1, 40: 1, 60: 0})


async def test_a_run_that_a_sweep_marked_and_its_worker_then_finished_is_a_false_positive(
    db: Database,
) -> None:
    for run_id in ("frozen", "dead"):
        db.add_run(run_id, age="2 hours", beat="40 minutes")
    await run_sweep(SweepRequest(asked_by="test", target=Target()))
    assert set(db.statuses().values()) == {"crashed"}
    with pytest.raises(RunLost) as lost:
        await finish_run("frozen", worker_id="worker-1", output={"rows": 1})
    assert lost.value.contested
    tested, at = await replayed(None, 40, 45)
    assert {m: (one.crashed, one.contested) for m, one in at.items()} == {
        30: (1, 1),
        40: (1, 1),
        45: (0, 0),
    }
    assert (tested.deaths, at[45].deaths_later) == (1, 1)


# Any table


def billing(
    db: Database, ddl: LiteralString, target: dict[str, Any], *runs: LiteralString
) -> Target:
    db.do(ddl)
    for run in runs:
        db.do(run)
    return Target(**{"name": "billing", "table": "jobs", **target})


@pytest.mark.parametrize(
    "setting", ["timezone = 'Asia/Tokyo'", "timezone = 'America/St_Johns'"], ids=["east", "west"]
)
async def test_naive_times_are_utc_and_a_key_of_several_columns_is_one_run(
    db: Database, setting: LiteralString
) -> None:
    set_for_all(db, setting)
    target = billing(
        db,
        "CREATE TABLE jobs (region text, no int, state text, kind text, made timestamp,"
        " seen timestamptz, ended timestamp, PRIMARY KEY (region, no))",
        {
            "in_flight": ("doing",),
            "crashed": "lost",
            "terminal": ("done", "lost"),
            "columns": Columns(
                id=("region", "no"),
                status="state",
                task="kind",
                created_at="made",
                heartbeat_at="seen",
                completed_at="ended",
            ),
        },
        # The one whose end is within the days, and the one without a beat, would be hours off.
        "INSERT INTO jobs SELECT 'eu', 1, 'done', 'k', e - interval '3 h',"
        " (e - interval '35 min') AT TIME ZONE 'UTC', e"
        " FROM (SELECT (now() AT TIME ZONE 'UTC') - interval '1 min' AS e) AS x",
        "INSERT INTO jobs SELECT 'eu', 2, 'done', 'k', e - interval '50 min', NULL, e"
        " FROM (SELECT (now() AT TIME ZONE 'UTC') - interval '23 h 59 min' AS e) AS x",
        "INSERT INTO jobs SELECT 'eu', 3, 'done', 'k', e - interval '50 min', NULL, e"
        " FROM (SELECT (now() AT TIME ZONE 'UTC') - interval '24 h 1 min' AS e) AS x",
    )
    verdict(db, '["eu", "1"]', "45 minutes", "sign_of_life", target="billing", ago="1 hour")
    tested, at = await replayed(target, 35, 45, 50, 51, days=1)
    assert crashed(at) == {30: 2, 35: 2, 45: 2, 50: 1, 51: 0}
    assert (tested.finished, tested.end_ahead, tested.only_in_ledger) == (2, 0, 0)


@pytest.mark.parametrize("declared", [True, False], ids=["terminal", "not told"])
async def test_where_a_crash_is_one_failure_of_many_only_marked_runs_are_left_out(
    db: Database, declared: bool
) -> None:
    target = billing(
        db,
        "CREATE TABLE jobs (id int PRIMARY KEY, status smallint, created_at timestamptz,"
        " completed_at timestamptz)",
        {"in_flight": ("1",), "crashed": "4", "waiting": ("0",)}
        | ({"terminal": ("2", "4")} if declared else {}),
        "INSERT INTO jobs SELECT n, CASE n WHEN 5 THEN 1 WHEN 6 THEN 0 WHEN 1 THEN 2 ELSE 4 END,"
        " now() - interval '2 h', now() - interval '1 h' FROM generate_series(1, 6) AS n",
    )
    verdict(db, "2", "61 minutes", target="billing")
    verdict(db, "3", "61 minutes", "sign_of_life", target="billing", ago="2 hours")
    verdict(db, "4", "61 minutes", target="default")
    tested, at = await replayed(target, 60)
    assert (tested.finished, at[60].crashed, tested.deaths) == (3, 3, 1)  # 1, 3 and 4
    assert any("ended as '4' counts as one that lived" in note for note in notes(tested))


async def test_where_no_column_has_the_end_only_the_ledger_is_read_and_that_is_said(
    db: Database,
) -> None:
    target = billing(
        db,
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)",
        {},
        "INSERT INTO jobs VALUES (1, 'completed', now() - interval '9 h')",
    )
    verdict(db, "2", "50 minutes", target="billing", reported="1 s")
    tested, at = await replayed(target)
    assert (tested.has_ends, tested.finished, at[30].crashed, at[60].crashed) == (False, 0, 1, 0)
    assert any("only the ledger was read" in note for note in notes(tested))
    assert "of 1 run that lived" in headline(tested)


async def test_without_a_ledger_the_table_is_read_and_that_is_said(blank: Database) -> None:
    target = billing(
        blank,
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz,"
        " completed_at timestamptz)",
        {"crashed": "failed"},
        "INSERT INTO jobs VALUES (1, 'failed', now() - interval '50 min', now())",
    )
    tested, at = await replayed(target)
    assert (tested.has_ledger, at[30].crashed, tested.deaths) == (False, 1, 0)
    assert any(note.startswith("There is no ledger yet") for note in notes(tested))


@pytest.mark.parametrize("crashed", ["crashed", "failed"])
async def test_a_role_that_may_not_read_the_ledger_reads_the_table_and_that_is_said(
    db: Database, monkeypatch: pytest.MonkeyPatch, crashed: str
) -> None:
    target = billing(
        db,
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz,"
        " completed_at timestamptz)",
        {"crashed": crashed},
        "INSERT INTO jobs VALUES (1, 'completed', now() - interval '50 min', now())",
    )
    verdict(db, "wrong", "50 minutes", reported="1 s")
    with a_role(db, "reader") as name:
        who = sql.Identifier(name)
        for grant in ("CREATE ROLE {} LOGIN", "GRANT SELECT ON jobs TO {}"):
            do(db, sql.SQL(grant).format(who))
        with seen_by(db, name) as reader:
            monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", reader.url)
            tested, at = await replayed(target)
            do(db, sql.SQL("GRANT USAGE ON SCHEMA orphan_recovery TO {}").format(who))
            assert (await replayed(target))[0].is_ledger_hidden, "its tables are not its to read"
    assert (tested.has_ledger, at[30].crashed, tested.deaths) == (False, 1, 0)
    [told] = [note for note in notes(tested) if "ledger" in note]
    assert told.startswith("This role may not read the ledger: nothing is known of verdicts that")
    assert ("is taken for a run that lived" in told) == (crashed == "failed")


async def test_what_workers_keep_elsewhere_is_ignored_and_that_is_said(db: Database) -> None:
    target = billing(
        db,
        "CREATE TABLE workers (id text PRIMARY KEY, seen timestamptz)",
        {"worker_heartbeat": Elsewhere(table="workers", key="id", run_key="w", last_seen="seen")},
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, w text, created_at timestamptz,"
        " completed_at timestamptz)",
        "INSERT INTO workers VALUES ('w', now() - interval '1 min')",
        "INSERT INTO jobs VALUES (1, 'completed', 'w', now() - interval '50 min', now())",
    )
    tested, at = await replayed(target)
    assert at[30].crashed == 1
    assert any("workers tell of now and not of then" in note for note in notes(tested))


# What is said


async def test_where_workers_hold_a_lock_it_is_said_that_no_threshold_decides(
    db: Database,
) -> None:
    finished(db, "run", "50 minutes")
    tested, at = await replayed(Target(lock="worker"))
    assert at[30].crashed == 1
    assert any("no threshold decides" in note for note in notes(tested))
    tested, _ = await replayed()
    assert not any("no threshold decides" in note for note in notes(tested))


async def test_few_runs_are_said_to_be_few(db: Database) -> None:
    many(db, FEW - 1)
    tested, _ = await replayed()
    assert headline(tested).endswith("; only 19 runs, too few to decide by")
    assert notes(tested)[0] == "Only 19 runs replayed: with fewer than 20, decide nothing."
    assert as_dict(tested)["few"]
    finished(db, "one more", "1 s")
    tested, _ = await replayed()
    assert "too few" not in headline(tested)
    assert not as_dict(tested)["few"]


async def test_nothing_to_replay_is_said_and_no_threshold_is_called_safe(db: Database) -> None:
    tested, _ = await replayed()
    assert headline(tested) == (
        "nothing to replay: the last 30 days have, in the table and the ledger, no run that is "
        "known to have lived"
    )
    assert tested.least_safe is None
    assert "│" not in shown(tested)


async def test_where_no_threshold_would_have_been_safe_the_longest_silence_is_told(
    db: Database,
) -> None:
    many(db, 20, "5 hours", task="night")
    tested, _ = await replayed()
    assert headline(tested) == (
        "30 min (now) would have crashed 20 of 20 runs that finished, in task night; each of "
        "these would have crashed some, and the longest silence was 5 h"
    )


async def test_where_no_run_beats_the_least_threshold_that_would_have_crashed_none_is_named(
    db: Database,
) -> None:
    many(db, 21, "6 minutes", beat=False)
    tested, _ = await replayed(None, 5, 10)
    told = "10 min is the least of these that would have crashed none: recovery would have come "
    assert headline(tested).endswith(f"; {told}20 min sooner")
    assert plot(tested)[1] == "10 min │0  (least that crashes none)"
    tested, _ = await replayed(Target(threshold_minutes=10), 5)
    assert headline(tested).endswith("; it is the least of these that would have crashed none")


async def test_a_shorter_threshold_that_is_safe_too_is_found_and_comes_sooner(
    db: Database,
) -> None:
    many(db, 21, "6 minutes")
    tested, _ = await replayed()
    assert headline(tested) == (
        "30 min (now) would have crashed none of 21 runs that finished, 5 min 21, in task report; "
        f"of 10 min and longer {NOT_KNOWN}: recovery would have come 20 min sooner"
    )


def shown(tested: Backtest, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show(tested, Console(file=file, width=width, highlight=False))
    file.flush()
    return raw.getvalue().decode(encoding)


async def test_the_plot_has_a_bar_as_long_as_its_count_and_shows_whatever_is_not_none(
    db: Database,
) -> None:
    db.do(
        "INSERT INTO worker_runs (id, status, created_at, heartbeat_at, completed_at)"
        " SELECT n::text, 'completed', e - interval '5 h', e - (CASE WHEN n = 1 THEN '90 min' WHEN"
        " n <= 500 THEN '7 min' ELSE '3 min' END)::interval, e"
        " FROM generate_series(1, 1000) AS n, (SELECT now() - interval '1 h' AS e) AS x"
    )
    tested, _ = await replayed(None, 1, 5, 60, 120)
    assert plot(tested, 80) == [
        "  1 min │" + 60 * "█" + " 1,000",
        "  5 min │" + 30 * "█" + " 500",
        " 30 min │▏ 1  (now)",
        " 60 min │▏ 1",
        "120 min │0  (none known from here on)",
    ]
    assert plot(tested, 35, ascii_only=True)[:3] == [
        "  1 min |" + 20 * "#" + " 1,000",
        "  5 min |" + 10 * "#" + " 500",
        " 30 min |# 1  (now)",
    ]
    for width in (50, 80, 120):
        assert max(map(len, shown(tested, width).splitlines())) <= width
    assert "  1 min |" + 60 * "#" + " 1,000" in shown(tested, encoding="ascii")
    assert f"```text\n{chr(10).join(plot(tested))}\n```" in as_markdown(tested)


async def test_a_runs_own_text_is_never_taken_for_markup_and_never_moves_the_cursor(
    db: Database,
) -> None:
    finished(db, "run", "2 hours", task="[red]a|b\x1b[2J\n*c* <b>")
    tested, _ = await replayed()
    assert "[red]a|b [2J *c* <b> 1" in shown(tested)
    assert "\x1b" not in shown(tested)
    row = next(line for line in as_markdown(tested).splitlines() if line.startswith("| 30 min"))
    assert row.endswith(r"| \[red\]a\|b \[2J \*c\* \<b\> 1 |")


# The command


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    here = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        [str(COMMAND), "backtest", *arguments],
        env={**here, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_table_plot_and_headline_for_a_pipe(db: Database) -> None:
    many(db, 20)
    many(db, 12, "20 minutes", task="import")
    done = run("--threshold-minutes", "15", "--threshold-minutes", "40", "--days", "7")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line != line.rstrip()] == [], "nor padded"
    told = [re.sub(r" {2,}", "  ", line.strip()) for line in lines]
    assert "threshold  wrongly crashed  of all  recovery comes  deaths kept waiting" in told
    assert "15 min  12  37.5%  15 min sooner  0" in told
    assert "30 min (now)  0  0.0%  as now  0" in told
    assert "40 min  0  0.0%  10 min later  0" in told
    assert "15 min │" + 60 * "█" + " 12" in lines
    assert "30 min │0  (now, none known from here on)" in lines
    assert "15 min  import 12" in lines
    assert lines[-1] == (
        "30 min (now) would have crashed none of 32 runs that finished, 15 min 12, in task "
        f"import; of 30 min and longer {NOT_KNOWN}"
    ), "in a pipe nothing is wrapped"


def test_on_a_terminal_tasks_go_on_below_themselves(db: Database) -> None:
    for n in range(5):
        many(db, 4, f"{40 + n} minutes", task=f"import of the customer numbered {n}")
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        with os.fdopen(theirs, "wb", buffering=0) as stdout:
            command = [str(COMMAND), "backtest", "--threshold-minutes", "30"]
            there = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
            subprocess.run(command, env=there, stdout=stdout, check=True)
        lines = terminal.read(100_000).decode().splitlines()
    assert max(map(len, lines)) <= 80
    first = next(n for n, line in enumerate(lines) if line.startswith("30 min  import of"))
    indent = len("30 min  ")
    assert lines[first + 1][:indent].isspace()
    assert not lines[first + 1][indent].isspace()


def test_the_command_prints_json_and_nothing_else(db: Database) -> None:
    many(db, 3)
    finished(db, "slow", "40 minutes", task="import")
    verdict(db, "dead", "45 minutes")
    done = run("--json", "--threshold-minutes", "60")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["target"], told["days"], told["present_threshold_minutes"]) == ("default", 30, 30)
    assert (told["replayed"], told["deaths"], told["few"]) == (4, 1, True)
    assert told["least_safe_minutes"] == 60
    assert told["longest_silence_seconds"] == 2400
    assert told["thresholds"] == [
        {
            "threshold_minutes": 30,
            "wrongly_crashed": 1,
            "share": 0.25,
            "tasks": [{"task": "import", "runs": 1}],
            "only_while_waiting": 0,
            "contested": 0,
            "escaped": 0,
            "perhaps": 0,
            "recovery_later_minutes": 0,
            "deaths_later": 0,
        },
        {
            "threshold_minutes": 60,
            "wrongly_crashed": 0,
            "share": 0.0,
            "tasks": [],
            "only_while_waiting": 0,
            "contested": 0,
            "escaped": 0,
            "perhaps": 0,
            "recovery_later_minutes": 30,
            "deaths_later": 1,
        },
    ]
    assert told["message"].startswith("30 min (now) would have crashed 1 of 4 runs that finished")


def test_the_command_reads_the_target_that_is_named(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(
        tmp_path,
        monkeypatch,
        '[targets.fleet]\nthreshold_minutes = 45\n[[targets.fleet.rules]]\nmatch = { task = "x" }\n'
        "never = true\n",
        "fleet",
    )
    finished(db, "x", "9 hours", task="x")
    finished(db, "y", "50 minutes", task="y")
    done = run("--target", "fleet")
    assert done.returncode == 0
    assert "1: task = x" in done.stdout
    assert "fleet: 45 min (now) would have crashed 1 of 1 run that finished" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold-minutes", "0"], "threshold_minutes is 0"),
        (["--threshold-minutes", "x"], "Invalid value for '--threshold-minutes'"),
        (["--days", "0"], "days is 0: give a whole number of days"),
        (["--days", "99999999"], "days is 99999999"),
        (["--target", "nowhere"], "there is no target 'nowhere'"),
    ],
)
def test_bad_usage_gives_exit_code_2_and_a_clear_line(
    db: Database, arguments: list[str], message: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_database_gives_exit_code_2_and_a_lost_one_exit_code_1(blank: Database) -> None:
    done = run()
    assert done.returncode == 2
    assert "run `orphan-recovery migrate`" in done.stderr
    done = run(ORPHAN_RECOVERY_DATABASE_URL=f"postgresql://me:S3cret@127.0.0.1:{free_port()}/no")
    assert done.returncode == 1
    assert "orphan-recovery: OperationalError: connection" in done.stderr
    assert "S3cret" not in done.stderr


async def test_it_writes_nothing_and_no_function_that_it_calls_could(
    db: Database,
) -> None:
    db.do(
        "CREATE FUNCTION mischief(text) RETURNS text LANGUAGE plpgsql AS"
        " $$ BEGIN DELETE FROM jobs; RETURN $1; END $$"
    )
    db.do("CREATE TABLE jobs (id text PRIMARY KEY)")
    db.do("CREATE DOMAIN odd AS text CHECK (mischief(VALUE) IS NOT NULL)")
    target = Target(table="odd_jobs", in_flight=("doing",))
    db.do("CREATE TABLE odd_jobs (id text PRIMARY KEY, status text, created_at timestamptz)")
    db.do("ALTER TABLE odd_jobs ADD completed_at timestamptz")
    db.do("ALTER TABLE odd_jobs ALTER status TYPE odd")
    with pytest.raises(Exception, match="read-only transaction"):
        await backtest_target(target)


@pytest.mark.parametrize("thresholds", [[0], [True], list(range(1, 52))])
async def test_thresholds_that_cannot_be_used_are_refused(
    db: Database, thresholds: list[int]
) -> None:
    with pytest.raises(ConfigurationError):
        await backtest_target(Target(), thresholds)


async def test_a_backtest_may_take_as_many_processes_of_the_server_as_the_server_gives(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a sweep: it may go through years, and somebody waits for it."""
    asked = "SHOW max_parallel_workers_per_gather"

    async def look(connection: AsyncConnection, *_: Any) -> Any:
        return (await connection.execute(text(asked))).scalar_one()

    monkeypatch.setattr(backtest, "backtest", look)
    given: Any = await backtest_target(Target())
    assert given == db.one(asked) != "0"


def test_the_report_needs_no_prefect() -> None:
    code = "import sys, orphan_recovery.backtest.report; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The flow


@pytest.fixture
def api(prefect: str) -> Api:
    return Api(prefect)


async def test_the_flow_ends_with_the_headline_and_leaves_two_artifacts(
    db: Database, api: Api
) -> None:
    many(db, 20)
    finished(db, "slow", "40 minutes", task="import")
    async with api.used():
        state = await backtest_thresholds(thresholds=[60], days=7, return_state=True)
    tested, _ = await replayed(None, 60, days=7)
    assert state.is_completed()
    assert state.message == headline(tested)
    artifacts = api.artifacts(flow_run_of(state))
    assert set(artifacts) == {"orphan-recovery-backtest", "orphan-recovery-backtest-table"}
    told = artifacts["orphan-recovery-backtest"]["data"]
    undated = re.compile(r"before \S+")
    assert undated.sub("", told) == undated.sub("", as_markdown(tested))
    rows = json.loads(artifacts["orphan-recovery-backtest-table"]["data"])
    assert [(row["threshold"], row["wrongly crashed"]) for row in rows] == [
        ("30 min (now)", "1"),
        ("60 min", "0"),
    ]


async def test_the_flow_keys_its_artifacts_by_target(
    db: Database, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, monkeypatch, "[targets.big_fleet]\nthreshold_minutes = 9\n", "big_fleet")
    async with api.used():
        state = await backtest_thresholds(target="big_fleet", return_state=True)
    assert state.is_completed()
    assert set(api.artifacts(flow_run_of(state))) == {
        "orphan-recovery-backtest-big-fleet",
        "orphan-recovery-backtest-big-fleet-table",
    }


async def test_a_flow_that_cannot_read_fails_in_one_line_and_makes_no_artifact(
    server: str, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database_of_its_own(server) as url:
        migrate(Target(), database_url(url))
        with Database(url) as database:
            database.do("CREATE ROLE nobody_reads LOGIN") if not database.do(
                "SELECT 1 FROM pg_roles WHERE rolname = 'nobody_reads'"
            ) else None
        setting = "options=-c%20role%3Dnobody_reads"
        monkeypatch.setenv(
            "ORPHAN_RECOVERY_DATABASE_URL", f"{url}{'&' if '?' in url else '?'}{setting}"
        )
        async with api.used():
            state = await backtest_thresholds(return_state=True)
    assert state.is_failed()
    assert state.message is not None
    assert "permission denied" in state.message
    assert "SELECT" not in state.message
    assert api.artifacts(flow_run_of(state)) == {}
