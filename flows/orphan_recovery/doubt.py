"""Doubt: when not to believe silence, and for how long.

The hazard is a blink that is taken for a death: a database that was away, a failover, a host that
slept, a network that was cut. Silence is no evidence while nobody could write. So where one of
these may be the cause, the sweep waits until whoever lives has had the time to beat, and looks
again before it believes.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Select, and_, case, func, literal, null, or_, select, text
from sqlalchemy.dialects.postgresql import TIMESTAMP

from orphan_recovery.database import NOW, Executor, Span, server_started
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import Fleet, Silence
from orphan_recovery.ledger import SAME_VERDICT, contests, holds, sweeps, verdicts
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import shortest, threshold_of
from orphan_recovery.run import Evidence
from orphan_recovery.runs import RunsTable
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import BEATS_IN_A_THRESHOLD, DEFAULT_BEAT_SECONDS, GRACE_BEATS
from orphan_recovery.verdict import Outcome
from orphan_recovery.words import counted, span

LONGEST_WAIT: Final = timedelta(seconds=60)
"""A sweep waits no longer than that; what would need more is left to the next one."""
LEAST_SAMPLE: Final = 5
"""Workers that beat from which an interval is estimated at all."""
CONTESTS_WITHIN: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of the database, of the last sweep, and of contested verdicts."""

    seen_at: datetime
    server_started_at: datetime
    standby: bool
    timeline: str | None
    """Of the write-ahead log: another one after a failover. None where the server does not say."""
    last_sweep_at: datetime | None = None
    other_timeline: bool = False
    """Whether a sweep has seen another one within a day."""
    timeline_seen_at: datetime | None = None
    """When a sweep first saw the present one."""
    open_holds: tuple[UUID, ...] = ()
    marked: int = 0
    """Verdicts that marked a run in the last 30 days; 0 also where none is contested."""
    contested: int = 0
    """Those of them that were contested."""

    @property
    def failed_over_for(self) -> timedelta | None:
        """How long it is known that the server has failed over; None if it has not, of late."""
        if not self.other_timeline:
            return None
        return self.seen_at - (self.timeline_seen_at or self.seen_at)

    def slept_for(self, request: SweepRequest) -> timedelta | None:
        """For how long no sweep has looked, where that is longer than a threshold: the shortest,
        where it is by time alone that runs are judged."""
        if self.last_sweep_at is None:
            return None
        by_time = request.target.lock is None and request.returned is None
        least = shortest(request) if by_time else timedelta(minutes=request.minutes)
        slept = self.seen_at - self.last_sweep_at
        return slept if slept > least else None

    def back_since(self, request: SweepRequest) -> datetime | None:
        """Since when whoever lives can have come back; None if nobody was kept from beating for
        so long that it matters."""
        if self.slept_for(request) is not None:
            return self.seen_at  # nothing tells when the others woke up
        back = self.server_started_at
        if self.failed_over_for is not None:
            back = max(back, self.seen_at - self.failed_over_for)
        return back if self.seen_at - back < shortest(request) else None


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why silence is not to be believed yet, and how long until it is."""

    reasons: tuple[str, ...]
    wait: timedelta

    def __str__(self) -> str:
        return " and ".join(self.reasons)


async def look_at_circumstances(db: Executor, request: SweepRequest) -> Circumstances:
    """Ask when the server was started, when the last sweep was, and what is held. Reads only.

    Raises:
        ConfigurationError: the database is a standby, where nothing can be marked.
    """
    statement = _server() if request.dry_run else _server_and_ledger(request.target.name)
    row = (await db.execute(statement)).mappings().one()
    found = Circumstances(**{**row, "open_holds": tuple(row.get("open_holds", ()))})
    if found.standby:
        raise ConfigurationError(
            f"the database of target {request.target.name!r} is a standby, where nothing can be "
            "marked: name the primary"
        )
    return found


async def look_at_server(db: Executor, before: Circumstances) -> Circumstances:
    """The same, as the server is now; what was before the sweep stays. Reads only."""
    row = (await db.execute(_server())).mappings().one()
    failed_over = row["timeline"] != before.timeline
    known = {"last_sweep_at": None, "other_timeline": failed_over, "timeline_seen_at": None}
    return replace(before, **{**row, **known})


async def are_writers_kept_out(db: Executor, request: SweepRequest) -> bool:
    """Whether somebody locks the runs, or what else shows signs of life, against writes: the build
    of an index does, and most changes of a table. Reads only."""
    table = await runs_table(db, request.target)
    kept = [table.relation, *(one.relation for one in table.elsewhere.values())]
    held = await db.execute(_LOCKED_AGAINST_WRITES, {"tables": [one.oid for one in kept]})
    return bool(held.scalar_one())


_LOCKED_AGAINST_WRITES: Final = text(
    """
    WITH RECURSIVE kept AS (  -- with their parts, each of which may be locked by itself
        SELECT unnest(CAST(:tables AS oid[])) AS oid
        UNION
        SELECT part.inhrelid FROM pg_catalog.pg_inherits AS part JOIN kept ON inhparent = kept.oid
    )
    SELECT EXISTS (
        SELECT FROM pg_catalog.pg_locks
        WHERE locktype = 'relation' AND granted AND relation IN (SELECT oid FROM kept)
          AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
          AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    )
    """
)


def doubts(
    now: Circumstances,
    fleet: Fleet,
    silence: Silence,
    request: SweepRequest,
    beat: timedelta,
    *,
    kept_out: bool = False,
) -> Doubt | None:
    """Whether the orphans of ``fleet`` are to be looked at a second time, and when.

    Only what has beaten once can beat again; for runs that show their age alone there is nothing
    to wait for. A lock goes with a connection, so that its holder may be about to take it again.

    Args:
        now: of the database and of the sweeps before.
        fleet: what is in flight.
        silence: how much of it is silent.
        request: the sweep.
        beat: how often whoever lives beats.
        kept_out: whether somebody locks the table against writes, or did at the last look.

    Returns:
        Every reason there is, and the longest wait that one of them asks for; None for no doubt.
    """
    reasons, wait, grace = [], timedelta(0), GRACE_BEATS * beat
    if request.target.lock is not None:
        reasons.append("a lock may be lost with a connection alone")
        wait = grace
    if not fleet.beating:
        return None
    if kept_out:
        reasons.append("somebody locks the table against writes, so that nobody can beat")
        wait = grace
    up = now.seen_at - now.server_started_at
    if up < grace:
        reasons.append(f"the server was started {span(up)} ago")
        wait = max(wait, grace - up)
    if now.failed_over_for is not None and now.failed_over_for < grace:
        reasons.append("the server has failed over")
        wait = max(wait, grace - now.failed_over_for)
    if (slept := now.slept_for(request)) is not None:
        reasons.append(f"no sweep has looked for {span(slept)}")
        wait = max(wait, beat)
    if silence.is_too_much(request.target):
        reasons.append(silence.in_words())
        wait = max(wait, min(beat, LONGEST_WAIT))
    return Doubt(tuple(reasons), wait) if reasons else None


async def beat_of(
    db: Executor, request: SweepRequest, back_since: datetime | None = None
) -> tuple[timedelta | None, str]:
    """How often workers beat, and how that is known. Reads only.

    Between two beats the silence of a worker is as likely short as long, so twice the median
    silence of those that do beat is the interval; dead ones among them only make it longer.

    Right after nobody could beat, those that do are the ones that have been quick to come back,
    and none of them can have been silent for longer than that. So it is asked, too, how long the
    others had been silent when the last was heard of before; and less than what is assumed where
    nothing is known is not believed, nor more than lets three beats fit into the threshold.

    Args:
        db: where to read.
        request: threshold, rules and scope.
        back_since: when those that live could beat again, where they could not of late.

    Returns:
        The interval, None where too few workers beat; and how it is known, in words.
    """
    declared = request.target.heartbeat_seconds
    if declared is not None:
        return timedelta(seconds=declared), "as heartbeat_seconds says"
    table = await runs_table(db, request.target)
    row = (await db.execute(_beating(table, request, None))).mappings().one()
    if back_since is not None:
        before = (await db.execute(_beating(table, request, back_since))).mappings().one()
        estimates = [one["median"] for one in (row, before) if one["workers"] >= LEAST_SAMPLE]
        if not estimates:
            return None, "too few workers beat to tell"
        least = timedelta(seconds=DEFAULT_BEAT_SECONDS)
        most = max(least, shortest(request) / BEATS_IN_A_THRESHOLD)
        return min(max(2 * max(estimates), least), most), "estimated from before and after"
    if row["workers"] < LEAST_SAMPLE:
        only = f"only {counted(row['workers'], 'worker')}" if row["workers"] else "no worker"
        return None, f"{only} beat just now"
    return 2 * row["median"], f"estimated from {row['workers']} workers that beat"


def _beating(table: RunsTable, request: SweepRequest, back_since: datetime | None) -> Select[Any]:
    """Of the workers that were no orphans at a moment, how many there are and their silence then.

    The moment is now; or the last sign of life before ``back_since``.
    """
    # Who holds several runs often beats for all of them at once: that is one beat.
    worker = table.text("worker_id") if table.has("worker_id") else null()
    sign, threshold = table.sign_of_life, threshold_of(table, request)
    runs = (
        select(
            func.coalesce(worker, table.run_id).label("worker"),
            sign.label("sign"),
            threshold.label("threshold"),
        )
        .select_from(table.reads_from())
        .where(table.in_flight, table.evidence != Evidence.AGE.value)
        .where(
            (NOW - sign).between(timedelta(0), threshold)
            if back_since is None
            else sign < literal(back_since, TIMESTAMP(timezone=True))
        )
        .subquery()
    )
    each = (
        select(func.max(runs.c.sign).label("sign"), func.max(runs.c.threshold).label("threshold"))
        .group_by(runs.c.worker)
        .cte("orphan_recovery_each")
    )
    then = NOW if back_since is None else select(func.max(each.c.sign)).scalar_subquery()
    silence = then - each.c.sign
    return select(
        func.count().label("workers"),
        func.percentile_cont(0.5).within_group(silence).label("median"),
    ).where(silence <= each.c.threshold)


def _server() -> Select[Any]:
    standby = func.pg_is_in_recovery()
    # The first eight digits of a segment's name are its timeline; a standby writes none. Aurora
    # refuses the question unless its wal_level is logical; but it restarts when it fails over.
    segment = func.pg_walfile_name(func.pg_current_wal_lsn())
    tells = or_(
        func.current_setting("rds.extensions", True).is_(None),
        func.current_setting("wal_level") == "logical",
    )
    return select(
        NOW.label("seen_at"),
        server_started().label("server_started_at"),
        standby.label("standby"),
        case((and_(~standby, tells), func.left(segment, 8)), else_=None).label("timeline"),
    )


def _server_and_ledger(target: str) -> Select[Any]:
    server = _server()
    last = (
        select(sweeps.c.opened_at)
        # Not a direct call, which has looked at nothing; and one that is open still may be
        # waiting by the same doubt.
        .where(sweeps.c.target == target, sweeps.c.in_flight.is_not(None))
        .where(sweeps.c.ended_at.is_not(None))
        .order_by(sweeps.c.opened_at.desc())
        .limit(1)
    )
    a_day_ago = NOW - literal(timedelta(days=1), Span)
    of_late = and_(sweeps.c.target == target, sweeps.c.opened_at > a_day_ago)
    timeline = server.selected_columns.timeline
    another = select(sweeps.c.sweep_id).where(of_late, sweeps.c.timeline != timeline).exists()
    seen = select(func.min(sweeps.c.opened_at)).where(of_late, sweeps.c.timeline == timeline)
    held = select(func.coalesce(func.array_agg(holds.c.hold_id), []))
    held = held.where(holds.c.target == target, holds.c.ended_at.is_(None))
    of_target = and_(
        verdicts.c.target == target,
        verdicts.c.outcome == Outcome.MARKED.value,
        verdicts.c.judged_at > NOW - literal(CONTESTS_WITHIN, Span),
    )
    contested = (
        select(func.count())
        .select_from(contests.join(verdicts, SAME_VERDICT))
        .where(of_target)
        .scalar_subquery()
    )
    marked = select(func.count()).select_from(verdicts).where(of_target).scalar_subquery()
    any_contest = select(contests.c.run_id).where(contests.c.target == target).exists()
    return server.add_columns(
        last.scalar_subquery().label("last_sweep_at"),
        another.label("other_timeline"),
        seen.scalar_subquery().label("timeline_seen_at"),
        held.scalar_subquery().label("open_holds"),
        case((any_contest, marked), else_=0).label("marked"),
        case((any_contest, contested), else_=0).label("contested"),
    )
