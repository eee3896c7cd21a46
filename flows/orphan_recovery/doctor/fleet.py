"""Doctor's questions about the fleet: its clocks, its beats, and what sweeps of it have said.

The hazard is a fleet that lives, and whose signs of life do not say so. Reads only.
"""

import json
from collections import Counter
from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, or_, select, text
from sqlalchemy.exc import DBAPIError

from orphan_recovery.backtest.measure import FEW, Backtest, backtest
from orphan_recovery.database import NOW
from orphan_recovery.detect import look_at_fleet, orphans
from orphan_recovery.doctor.finding import Examined, Finding, Level
from orphan_recovery.doctor.schedule import DEFAULT_INTERVAL
from orphan_recovery.doctor.time_zone import naive_times
from orphan_recovery.doubt import beat_of, look_at_circumstances
from orphan_recovery.ledger import SCHEMA, Ended, approvals, holds, sweeps, verdicts
from orphan_recovery.rules import shortest
from orphan_recovery.target import BEATS_IN_A_THRESHOLD, GRACE_BEATS
from orphan_recovery.targets import where
from orphan_recovery.verdict import Outcome
from orphan_recovery.words import counted, iso, some_of, span

SWEEPS_MISSED: Final = 3
"""Intervals between sweeps after which the last that ended well is too long ago."""
WRONGLY_CRASHED: Final = 0.05
"""The share of the runs that finished above which a threshold that would have crashed them is a
failure."""
REPLAY_MS: Final = 3_000
"""How long a look through the runs that finished may take, before it is left to `backtest`."""
QUERY_CANCELED: Final = "57014"


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
        return [await _by_age(asked, told)]
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


async def _by_age(asked: Examined, told: str) -> Finding:
    """Where runs do not beat, those that finished tell whether the threshold is too short."""
    level, table = Level.WARNING, asked.table
    told += "; runs do not beat, so that age is taken for silence"
    way_out = (
        "let runs beat, or keep the threshold above the longest honest run: `orphan-recovery "
        f"backtest --target {table.target.name}` says how many runs that finished each threshold "
        "would have crashed"
    )
    # What events tell is of now and not of then, so that more would look silent than was.
    tested = None if table.elsewhere or not table.has("completed_at") else await _tested(asked)
    of = tested.replayed + sum(rule.runs for rule in tested.rules) if tested else 0
    if tested and of:
        crashed = tested.present.crashed + sum(rule.crashed for rule in tested.rules)
        told += f"; of {counted(of, 'run')} that finished in the last {tested.days} days it would "
        told += f"have crashed {crashed or 'none'}"
        if of >= FEW and crashed > WRONGLY_CRASHED * of:
            level = Level.FAILURE
    return Finding(level, "threshold", told, way_out)


async def _tested(asked: Examined) -> Backtest | None:
    """The target's own threshold, replayed; None where that takes long."""
    target = asked.table.target
    await asked.db.execute(select(func.set_config("statement_timeout", str(REPLAY_MS), True)))
    try:
        return await backtest(asked.db, target, (target.threshold_minutes,))
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != QUERY_CANCELED:
            raise
        return None


async def look_at_last_sweep(asked: Examined) -> list[Finding]:
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.sweeps"))) is None:
        return []  # said already: there is no ledger
    name = asked.table.target.name
    statement = select(NOW - func.max(sweeps.c.ended_at)).where(
        sweeps.c.target == name, sweeps.c.ended_as == Ended.COMPLETED.value
    )
    age: timedelta | None = await asked.db.scalar(statement)
    since = (await asked.db.execute(_SINCE_THE_LAST, {"target": name})).all()
    told = "no sweep of this target has ended well yet"
    if age is not None:
        told = f"the last sweep that ended well was {span(age)} ago"
    way_out = "see whether the schedule, its worker and its database address are well"
    longest = SWEEPS_MISSED * (asked.schedule.every or DEFAULT_INTERVAL)
    amiss = Counter(row.ended_as for row in since if row.ended_as != Ended.HELD.value)
    if amiss:
        told += f"; of those {'so far' if age is None else 'since'}, "
        told += ", ".join(f"{runs} {_AMISS[how]}" for how, runs in amiss.items())
        for row in since:
            if because := row.error or await _why_not_marked(asked, row.sweep_id, row.failed):
                told += f"; the last because {because}"
                way_out = f"mend that cause; its verdicts are under sweep {row.sweep_id}"
                break
    if since and since[0].ended_as == Ended.HELD.value:
        told += f"; the last was held, {span(since[0].age)} ago"
        is_late = amiss or since[0].age > longest
        way_out = f"see hold; and {way_out}" if is_late else "see hold"
    elif age is None and not amiss:
        way_out = f"`orphan-recovery sweep --target {name} --dry-run`, then without --dry-run"
    elif age is not None and not amiss and age <= longest:
        return [Finding(Level.OK, "last sweep", told)]
    return [Finding(Level.WARNING, "last sweep", told, way_out)]


async def _why_not_marked(asked: Examined, sweep_id: UUID, failed: int | None) -> str | None:
    """Of a sweep that came to its end, and has no error of its own: the newest of its runs'."""
    if not failed:
        return None
    newest = select(verdicts.c.error).where(
        verdicts.c.sweep_id == sweep_id, verdicts.c.outcome == Outcome.FAILED.value
    )
    error = await asked.db.scalar(newest.order_by(verdicts.c.judged_at.desc()).limit(1))
    return f"{counted(failed, 'run')} could not be marked{f' ({error})' if error else ''}"


_AMISS: Final = {"failed": "failed", "died": "died", None: "open still, or cut off"}

# One that is open for longer than a minute may be at work, or was cut off before it could close
# itself.
_SINCE_THE_LAST: Final = text(
    f"""
    SELECT sweep_id, ended_as, error, failed, statement_timestamp() - opened_at AS age
    FROM {SCHEMA}.sweeps
    WHERE target = :target
      AND opened_at > coalesce((SELECT max(opened_at) FROM {SCHEMA}.sweeps
                                WHERE target = :target AND ended_as = 'completed'), '-infinity')
      AND (ended_as IN ('failed', 'died', 'held')
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
        found.append(Finding(Level.FAILURE, "hold", told, way_out))
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
