"""Doctor's question about times without a time zone: is it UTC that is written into them?

The hazard is local time, which is read as UTC: a worker that beats looks silent for as many hours
as its zone is west of it, and east of it it beats in the future. No row tells that by itself. So
this asks which zones sessions have here, and whether the newest time is off by just as much. Reads
only.
"""

from datetime import timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Select, func, select, text

from orphan_recovery.database import NOW, Executor
from orphan_recovery.doctor.finding import Examined, Finding, Level
from orphan_recovery.runs import TIMES, RunsTable
from orphan_recovery.words import span

STEP: Final = timedelta(minutes=30)
"""By how much zones differ, but for a few."""
NEAR: Final = timedelta(minutes=1)
"""How far off the newest beat of a fleet that lives may be."""
FARTHEST: Final = timedelta(hours=14)
"""No zone is further from UTC."""


class NaiveTime(NamedTuple):
    """A sign of life in a column without a time zone."""

    name: str
    read: ColumnElement[Any]
    """As a sweep reads it."""
    is_beat: bool
    """Whether somebody who lives goes on giving it."""


def naive_times(table: RunsTable) -> list[NaiveTime]:
    """All that a target has."""
    found = [
        NaiveTime(table.facts[role].name, table.utc(role), role == "heartbeat_at")
        for role in TIMES
        if table.has(role) and table.facts[role].kind == "timestamp"
    ]
    for what, kept in table.elsewhere.items():
        if kept.last_seen.kind == "timestamp":
            name = f"{getattr(table.target, what).table}.{kept.last_seen.name}"
            found.append(NaiveTime(name, kept.latest.c.seen_at, True))
    return found


async def look_at_time_zone(asked: Examined) -> list[Finding]:
    """Whether what is read as UTC is UTC; nothing where every time has its zone."""
    table = asked.table
    naive = naive_times(table)
    if not naive:
        return []
    zones = await _zones(asked.db)
    told = f"{', '.join(time.name for time in naive)}: without a time zone, so read as UTC"
    way_out = "let workers write now() AT TIME ZONE 'UTC' there, or make it timestamptz"
    amiss = []
    for name, read, is_beat in naive:
        age = await _age_of_newest(asked.db, table, read)
        if age is None:
            continue
        zone = next((zone for zone, ahead in zones.items() if _is_near(age, -ahead)), None)
        if zone is None and not (is_beat and _is_off_by_hours(age)):
            continue
        off = f"{span(abs(age))} {'old' if age > timedelta(0) else 'in the future'}"
        by = f"as {zone} has it" if zone else "as some time zone may have it"
        amiss.append(
            Finding(
                Level.FAILURE if zone else Level.WARNING,
                "time zone",
                f"{told}; but the newest {name} in flight is {off}, {by}: where local time is "
                "written, who lives looks silent, or is not judged",
                way_out,
            )
        )
    if amiss:
        return amiss
    if zones:
        told = f"{told}; sessions here may have TimeZone {', '.join(zones)}, and by now() they "
        return [Finding(Level.WARNING, "time zone", f"{told}write local time", way_out)]
    return [Finding(Level.OK, "time zone", told)]


async def _zones(db: Executor) -> dict[str, timedelta]:
    """The zones that sessions of this database have by its settings and its roles', and by how much
    each is ahead of UTC now; without those that are never."""
    statement = text(
        """
        SELECT zone, (now() AT TIME ZONE zone) - (now() AT TIME ZONE 'UTC') AS ahead
        FROM (SELECT current_setting('TimeZone') AS zone
              UNION
              SELECT substr(setting, strpos(setting, '=') + 1)
              FROM pg_db_role_setting, unnest(setconfig) AS setting
              WHERE lower(setting) LIKE 'timezone=%'
                AND setdatabase IN (0, (SELECT oid FROM pg_database
                                        WHERE datname = current_database()))) AS zones
        WHERE now() AT TIME ZONE zone <> now() AT TIME ZONE 'UTC'
           OR (now() + interval '6 months') AT TIME ZONE zone
              <> (now() + interval '6 months') AT TIME ZONE 'UTC'
        ORDER BY zone
        """
    )
    return {row.zone: row.ahead for row in await db.execute(statement)}


async def _age_of_newest(
    db: Executor, table: RunsTable, time: ColumnElement[Any]
) -> timedelta | None:
    """How old the newest is, of runs in flight; negative in the future, None if there is none."""
    newest: Select[Any] = select(NOW - func.max(time)).select_from(table.reads_from())
    age: timedelta | None = (await db.execute(newest.where(table.in_flight))).scalar_one()
    return age


def _is_near(one: timedelta, other: timedelta) -> bool:
    return bool(other) and abs(one - other) <= NEAR


def _is_off_by_hours(age: timedelta) -> bool:
    steps = round(age / STEP)
    return abs(age) <= FARTHEST + NEAR and _is_near(age, steps * STEP)
