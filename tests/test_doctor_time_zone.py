"""Doctor on times without a zone: local time is found, and UTC is not taken for it."""

import re
from collections.abc import Callable

import pytest
from psycopg import sql
from sqlalchemy import make_url

from orphan_recovery.doctor.examine import examine
from orphan_recovery.doctor.finding import Finding, Level
from orphan_recovery.target import Elsewhere, Target
from sql_support import a_role
from support import Database
from tables_support import do, set_for_all

# Of those that keep one time all the year, so that a test says the same in summer.
WEST, EAST, HALF = "America/Bogota", "Asia/Tokyo", "Asia/Kolkata"
TARGET = Target(name="mine", table="jobs")


def a_run(
    db: Database, *, beats_in: str | None, kind: str = "timestamp", ago: str = "10 seconds"
) -> None:
    """A table with one run, which was created just now by UTC and beat so long ago by a zone."""
    columns = sql.SQL("id int PRIMARY KEY, status text, created_at {0}, heartbeat_at {0}")
    do(db, sql.SQL("CREATE TABLE jobs ({})").format(columns.format(sql.SQL(kind))))
    db.do(
        "INSERT INTO jobs VALUES (1, 'running', now() AT TIME ZONE 'UTC',"
        " (now() - %s::interval) AT TIME ZONE %s)",
        *(ago, beats_in),
    )


async def lines(target: Target = TARGET) -> list[Finding]:
    return [finding for finding in await examine(target) if finding.about == "time zone"]


async def test_utc_where_all_sessions_have_utc_is_well(blank: Database) -> None:
    a_run(blank, beats_in="UTC")
    [line] = await lines()
    assert (line.level, line.way_out) == (Level.OK, None)
    assert line.told == "created_at, heartbeat_at: without a time zone, so read as UTC"


async def test_of_times_with_a_zone_there_is_nothing_to_say(blank: Database) -> None:
    set_for_all(blank, f"TimeZone = '{WEST}'")
    a_run(blank, beats_in="UTC", kind="timestamptz")
    assert await lines() == []


@pytest.mark.parametrize("zone", [WEST, EAST, "Europe/London", "Antarctica/Casey"])
async def test_a_zone_that_sessions_of_the_database_have_is_a_warning(
    blank: Database, zone: str
) -> None:
    """Also one that is UTC for half of the year."""
    set_for_all(blank, f"TimeZone = '{zone}'")
    a_run(blank, beats_in="UTC")
    [line] = await lines()
    assert line.level is Level.WARNING
    assert f"sessions here may have TimeZone {zone}, and by now() they write local" in line.told
    assert line.way_out == (
        "let workers write now() AT TIME ZONE 'UTC' there, or make it timestamptz"
    )


@pytest.mark.parametrize("everywhere", [True, False], ids=["in all databases", "in this one"])
async def test_a_zone_that_another_role_has_is_a_warning_too(
    blank: Database, everywhere: bool
) -> None:
    a_run(blank, beats_in="UTC")
    with a_role(blank, "worker") as name:
        who, here = sql.Identifier(name), sql.Identifier(make_url(blank.url).database or "")
        do(blank, sql.SQL("CREATE ROLE {}").format(who))
        where = sql.SQL("") if everywhere else sql.SQL("IN DATABASE {}").format(here)
        do(blank, sql.SQL("ALTER ROLE {} {} SET timezone = {}").format(who, where, EAST))
        [line] = await lines()
    assert line.level is Level.WARNING
    assert f"TimeZone {EAST}, " in line.told


async def test_a_zone_that_is_always_utc_by_another_name_is_none(blank: Database) -> None:
    set_for_all(blank, "TimeZone = 'Etc/Zulu'")
    a_run(blank, beats_in="UTC")
    assert [line.level for line in await lines()] == [Level.OK]


@pytest.mark.parametrize(
    ("zone", "off"), [(WEST, r"5 h \d+ s old"), (EAST, r"8 h 59 min in the future")]
)
async def test_local_time_of_a_zone_that_sessions_have_is_a_failure(
    blank: Database, zone: str, off: str
) -> None:
    set_for_all(blank, f"TimeZone = '{zone}'")
    a_run(blank, beats_in=zone)
    [line] = await lines()
    assert line.level is Level.FAILURE
    assert re.search(f"the newest heartbeat_at in flight is {off}, as {zone} has it", line.told)
    assert line.way_out


async def test_local_time_of_workers_that_beat_elsewhere_is_one_too(blank: Database) -> None:
    set_for_all(blank, f"TimeZone = '{WEST}'")
    blank.do("CREATE TABLE workers (id int PRIMARY KEY, seen timestamp)")
    blank.do("INSERT INTO workers VALUES (7, now() AT TIME ZONE %s)", WEST)
    blank.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, worker_id int)")
    blank.do("INSERT INTO jobs VALUES (1, 'running', 7)")
    kept = Elsewhere(table="workers", key="id", run_key="worker_id", last_seen="seen")
    [line] = await lines(Target(name="mine", table="jobs", worker_heartbeat=kept))
    assert line.level is Level.FAILURE
    assert line.told.startswith("workers.seen: without a time zone")
    assert "the newest workers.seen in flight is 5 h" in line.told


@pytest.mark.parametrize(
    ("zone", "off"), [(HALF, "5 h 29 min in the future"), (WEST, r"5 h \d+ s old")]
)
async def test_a_beat_that_is_off_by_half_hours_is_a_warning_whatever_the_zones(
    blank: Database, zone: str, off: str
) -> None:
    """A worker may bring a zone of its own, or write its host's."""
    a_run(blank, beats_in=zone)
    [line] = await lines()
    assert line.level is Level.WARNING
    assert re.search(f"the newest heartbeat_at in flight is {off}, as some time zone", line.told)


def nothing_in_flight(db: Database) -> None:
    a_run(db, beats_in=WEST)
    db.do("UPDATE jobs SET status = 'completed'")


def created_long_ago(db: Database) -> None:
    a_run(db, beats_in=None)
    db.do("UPDATE jobs SET created_at = created_at - interval '5 hours'")


@pytest.mark.parametrize(
    "made",
    [
        lambda db: a_run(db, beats_in="UTC", ago="5 hours 10 minutes"),
        lambda db: a_run(db, beats_in="UTC", ago="20 hours"),
        created_long_ago,
        nothing_in_flight,
    ],
    ids=["silent for long", "for longer than any zone is off", "no beat", "none in flight"],
)
async def test_what_is_only_silent_is_not_taken_for_local_time(
    blank: Database, made: Callable[[Database], None]
) -> None:
    made(blank)
    assert [line.level for line in await lines()] == [Level.OK]
