"""Doctor's questions about the fleet: its clocks, its beats, and what sweeps of it have said.

The hazard is a fleet that lives, and whose signs of life do not say so. Reads only.
"""

import json
from datetime import timedelta
from typing import Final

from sqlalchemy import func, or_, select, text

from orphan_recovery.database import NOW
from orphan_recovery.detect import look_at_fleet, orphans
from orphan_recovery.doctor.finding import Examined, Finding, Level
from orphan_recovery.doctor.schedule import DEFAULT_INTERVAL
from orphan_recovery.doctor.time_zone import naive_times
from orphan_recovery.doubt import beat_of, look_at_circumstances
from orphan_recovery.ledger import SCHEMA, Ended, approvals, holds, sweeps
from orphan_recovery.rules import shortest
from orphan_recovery.target import BEATS_IN_A_THRESHOLD, GRACE_BEATS
from orphan_recovery.targets import where
from orphan_recovery.words import counted, iso, some_of, span

SWEEPS_MISSED: Final = 3
"""Intervals between sweeps after which the last that ended well is too long ago."""


async def look_at_clocks(asked: Examined) -> list[Finding]:
    fleet = await look_at_fleet(asked.db, asked.request)
    found = []
    if fleet.ahead:
        workers = ", ".join(fleet.ahead_workers) or "no worker named"
        runs = counted(fleet.ahead, "run")
        told = f"{runs} in flight with a sign of life in the database's future ({workers})"
        way_out = "set those hosts' clocks right, and let workers beat with the database's now()"
        if naive_times(asked.table):
            way_out += "; or see below, at time zone: some columns have none"
        found.append(Finding(Level.FAILURE, "clocks", told, way_out))
    if fleet.undatable:
        some = ", ".join(await _undatable(asked))
        told = f"{fleet.undatable} in flight without any sign of life, never swept: {some}"
        way_out = (
            "see whether the description names all columns with times; give the runs a time of "
            "creation, or end them by hand"
        )
        found.append(Finding(Level.WARNING, "clocks", told, way_out))
    told = f"{fleet.in_flight} in flight, {fleet.exempt} exempt by a rule"
    return found or [Finding(Level.OK, "clocks", f"{told}; no sign of life is in the future")]


async def look_at_queue(asked: Examined) -> list[Finding]:
    """Whether a backlog is taken for dead: runs that nobody has begun have nobody to beat."""
    table = asked.table
    if not table.has("worker_id"):
        return []
    found = orphans(table, asked.request).order_by(None).subquery()
    begun = or_(found.c.worker_id.is_not(None), found.c.started_at.is_not(None))
    statement = select(found.c.status, func.count()).where(~begun).group_by(found.c.status)
    waiting = {row[0]: row[1] for row in await asked.db.execute(statement)}
    if not waiting:
        return []
    told = ", ".join(f"{status}: {runs:,}" for status, runs in sorted(waiting.items()))
    rule = f"match = {{ status = {json.dumps(min(waiting), ensure_ascii=False)} }}"
    return [
        Finding(
            Level.WARNING,
            "queue",
            "runs that no worker has begun are silent for their threshold, and would be marked: "
            f"{told}",
            f"if runs may wait so long, say so by a rule in {where(table.target, 'rules')}, with "
            f"{rule} and a longer threshold_minutes, or never = true",
        )
    ]


async def _undatable(asked: Examined) -> list[str]:
    table = asked.table
    found = select(table.run_id).select_from(table.reads_from())
    found = found.where(table.in_flight, table.sign_of_life.is_(None)).order_by(*table.key)
    return list(await asked.db.scalars(found.limit(5)))


async def look_at_threshold(asked: Examined) -> list[Finding]:
    table, target = asked.table, asked.table.target
    if target.lock is not None:
        return []  # no time is the evidence there
    least = shortest(asked.request)
    every = asked.schedule.every or DEFAULT_INTERVAL
    told = f"the shortest threshold is {span(least)}, a sweep comes every {span(every)}"
    beat, how = await beat_of(asked.db, asked.request)
    if beat is None:
        if table.has("heartbeat_at") or "worker_heartbeat" in table.elsewhere:
            way_out = f"set {where(target, 'heartbeat_seconds')}, or ask again while runs beat"
            told = f"{told}; {how}, so that it cannot be held against the heartbeat"
            return [Finding(Level.WARNING, "threshold", told, way_out)]
        way_out = "let runs beat, or keep the threshold above the longest honest run"
        told = f"{told}; runs do not beat, so that age is taken for silence"
        return [Finding(Level.WARNING, "threshold", told, way_out)]
    needed = BEATS_IN_A_THRESHOLD * beat + every
    told = f"{told}, and a beat every {span(beat)} ({how})"
    if least < needed:
        minutes = -(-needed // timedelta(minutes=1))
        way_out = (
            f"set the threshold to at least {counted(minutes, 'minute')} "
            f"({BEATS_IN_A_THRESHOLD} beats and one interval between sweeps), or let runs beat, or "
            "sweep, more often"
        )
        if target.heartbeat_seconds is None:
            way_out += (
                f"; if workers beat more often than that, say so in "
                f"{where(target, 'heartbeat_seconds')}: runs that died of late make the estimate "
                "longer"
            )
        return [Finding(Level.FAILURE, "threshold", f"{told}: too short", way_out)]
    if target.heartbeat_seconds is None and beat > GRACE_BEATS * target.beat:
        told = f"{told}; right after a restart of the server that cannot be measured"
        way_out = (
            f"say so in {where(target, 'heartbeat_seconds')}: a sweep then gives whoever lives the "
            f"time to beat, where it may else take a beat for {span(target.beat)}"
        )
        return [Finding(Level.WARNING, "threshold", told, way_out)]
    return [Finding(Level.OK, "threshold", told)]


async def look_at_last_sweep(asked: Examined) -> list[Finding]:
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.sweeps"))) is None:
        return []  # said already: there is no ledger
    statement = select(NOW - func.max(sweeps.c.ended_at)).where(
        sweeps.c.target == asked.table.target.name, sweeps.c.ended_as == Ended.COMPLETED.value
    )
    age: timedelta | None = await asked.db.scalar(statement)
    way_out = "see whether the schedule, its worker and its database address are well"
    if age is None:
        told = "no sweep of this target has ended well yet"
        first = f"`orphan-recovery sweep --target {asked.table.target.name} --dry-run`"
        return [Finding(Level.WARNING, "last sweep", told, f"{first}, then without --dry-run")]
    told = f"the last sweep that ended well was {span(age)} ago"
    since = await asked.db.execute(_SINCE_THE_LAST, {"target": asked.table.target.name})
    if failed := since.all():
        told = f"{told}; of those since, {counted(len(failed), 'sweep')} did not, or not yet"
        error = next((row.error for row in failed if row.error), None)
        told += f"; the last because {error}" if error else ""
        return [Finding(Level.WARNING, "last sweep", told, way_out)]
    if age > SWEEPS_MISSED * (asked.schedule.every or DEFAULT_INTERVAL):
        return [Finding(Level.WARNING, "last sweep", told, way_out)]
    return [Finding(Level.OK, "last sweep", told)]


# One that is open for longer than a minute may be at work, or was cut off before it could close
# itself. What a hold stopped is told of by the hold.
_SINCE_THE_LAST: Final = text(
    f"""
    SELECT error FROM {SCHEMA}.sweeps
    WHERE target = :target
      AND opened_at > (SELECT max(opened_at) FROM {SCHEMA}.sweeps
                       WHERE target = :target AND ended_as = 'completed')
      AND (ended_as IN ('failed', 'died')
           OR (ended_at IS NULL AND opened_at < statement_timestamp() - interval '1 minute'))
    ORDER BY opened_at DESC LIMIT 100
    """  # noqa: S608 - of constants
)


async def look_at_holds(asked: Examined) -> list[Finding]:
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.holds"))) is None:
        return []  # said already: there is no ledger
    name = asked.table.target.name
    until = select(func.max(approvals.c.expires_at)).where(
        approvals.c.hold_id == holds.c.hold_id,
        approvals.c.expires_at > NOW,
    )
    standing = await asked.db.execute(
        select(holds.c.hold_id, holds.c.opened_at, holds.c.evidence, until.scalar_subquery())
        .where(holds.c.target == name, holds.c.ended_at.is_(None))
        .order_by(holds.c.opened_at)
    )
    found = []
    for hold_id, opened_at, saw, expires_at in standing:
        told = (
            f"hold {hold_id} stands since {iso(opened_at)}: {saw['silent_workers']} of "
            f"{saw['workers']} {saw['counted']} looked dead"
            f"{some_of(saw['some_silent_workers'], saw['silent_workers'])}"
        )
        if expires_at is not None:
            told += f"; it is released until {iso(expires_at)}, and the next sweep marks its runs"
            found.append(Finding(Level.OK, "hold", told))
            continue
        way_out = (
            f"if they are dead, `orphan-recovery approve {hold_id} --target {name}`; if they live, "
            "nothing: it is closed by the first sweep that hears of them"
        )
        found.append(Finding(Level.WARNING, "hold", told, way_out))
    return found


async def look_at_contests(asked: Examined) -> list[Finding]:
    target = asked.table.target
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.contests"))) is None:
        return []  # said already: there is no ledger
    now = await look_at_circumstances(asked.db, asked.request)
    which = "no verdict of the last 30 days was"
    if now.contested:
        which = f"{now.contested} of {now.marked} verdicts of the last 30 days were"
    told = f"{which} contested by a worker that lived"
    if now.contested > target.contest_limit * now.marked:
        told = f"{told}: more than the limit of {target.contest_limit:.1%}"
        way_out = "`orphan-recovery summary` says for which tasks; give them a longer threshold"
        return [Finding(Level.WARNING, "contests", told, way_out)]
    return [Finding(Level.OK, "contests", told)]


async def look_at_lock(asked: Examined) -> list[Finding]:
    """Whether a session stays with its connection. Through a transaction-mode pooler, another
    transaction in between gets the session that this one had."""
    target = asked.table.target
    if target.lock is None:
        return []
    ask = text("SELECT pg_backend_pid()")
    pids = {await asked.db.scalar(ask)}
    async with asked.db.engine.connect() as between:
        for _ in range(3):
            await asked.db.rollback()
            await between.execute(ask)  # holds a session while ours is given back
            pids.add(await asked.db.scalar(ask))
            await between.rollback()
    if len(pids) > 1:
        told = f"lock evidence goes through a pooler that shares sessions ({len(pids)} seen)"
        way_out = "give workers and sweeps a direct address, or one of a session-mode pooler"
        return [Finding(Level.FAILURE, "lock", told, way_out)]
    locked = await asked.db.execute(
        select(func.count())
        .select_from(asked.table.reads_from())
        .where(asked.table.in_flight, asked.table.is_locked)
    )
    runs = counted(locked.scalar_one(), "run")
    told = f"a {target.lock}'s lock is held for {runs} in flight"
    return [Finding(Level.OK, "lock", told)]
