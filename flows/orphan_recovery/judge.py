"""Judge: mark all that a sweep may mark; in slices, then page by page what those passed over.

The hazard is that one bad row, or one bad moment, costs the rest its recovery. So all is done in
small transactions, each of them tried again while its error is transient; a slice that fails is
judged page by page; and only an outage of the database itself ends it, loudly. What is left is
found again by the next sweep.
"""

import asyncio
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.attempt import in_transaction
from orphan_recovery.detect import Among
from orphan_recovery.events import log_detected, log_gives_way, log_marked, log_verdict
from orphan_recovery.hold import Decision
from orphan_recovery.judge_pages import PAGE, judge_pages, mark_page
from orphan_recovery.lane import (
    ASK_AGAIN_SECONDS,
    LANES,
    LONGEST_PAUSE_SECONDS,
    PACED,
    SHARE,
    SMALL_SLICE,
    Lane,
    Traffic,
    enter,
)
from orphan_recovery.policy import is_outage
from orphan_recovery.report import SHOWN, SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.slices import (
    Slice,
    Stretch,
    is_sliceable,
    look_at_slice,
    position_of,
    take_slice,
)
from orphan_recovery.verdict import Outcome, Verdict

MANY: Final = 10 * SHOWN
"""Of so many orphans the other lane takes up to a half before the first has shown what it is to."""
LARGEST_SLICE: Final = 5_000
"""Larger ones are no quicker, and keep rows locked for longer."""
LONG, SHORT = 0.5, 0.2
"""In seconds: a slice that takes longer makes the next one half as large, a quicker one larger;
so no row is locked for a second, however slow the disk."""


@dataclass(slots=True)
class Progress:
    """How far slices have come, and what they did since it was asked last."""

    size: int = SHOWN
    """Of the first slice."""
    show: int = SHOWN
    """Runs that are still to be shown one by one, by the first lane."""
    orphans: int = 0
    """As many as there are to be marked, by the last count; 0 where nobody counted."""
    lanes: list[Lane] = field(default_factory=list)
    detected: int = 0
    marked: int = 0
    """Of those that are not among the verdicts."""
    verdicts: list[Verdict] = field(default_factory=list)
    judged: set[str] = field(default_factory=set)
    """Runs that have a verdict by going row by row, in either lane: one that failed, or changed
    hands, may look like an orphan still."""
    traffic: Traffic = field(default_factory=Traffic)
    careful: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One lane at a time goes row by row, so that both do not fail at the same one."""

    def __post_init__(self) -> None:
        self.lanes = self.lanes or [Lane(self.size)]

    @property
    def is_through(self) -> bool:
        return all(lane.is_through for lane in self.lanes)

    def shows(self, lane: Lane) -> bool:
        """Whether this lane's next slice returns its verdicts one by one."""
        return self.show > 0 and lane is self.lanes[0]

    @property
    def is_spared(self) -> bool:
        """Whether what is left is the first lane's, so that it finds enough to show."""
        return self.show > 0 and self.orphans - self.detected < MANY // 2

    def left_for(self, lane: Lane) -> Stretch:
        """What lies between the lanes, from this one's end."""
        first, *others = self.lanes
        before = others[0].after if others else None
        return Stretch(first.after, before, backwards=lane is not first)

    def hand_over_to(self, report: SweepReport) -> None:
        """Tell the report, and begin to count anew."""
        report.detected += self.detected
        report.judged([v for v in self.verdicts if v.outcome is not Outcome.FAILED])
        report.counts[Outcome.MARKED] += self.marked
        self.orphans = max(0, self.orphans - self.detected)
        self.detected, self.marked, self.verdicts = 0, 0, []


async def judge_all(
    engine: AsyncEngine, report: SweepReport, decision: Decision, failed: list[Verdict]
) -> None:
    """Mark all that a sweep may mark. Commits slice by slice, and page by page.

    Args:
        engine: where the runs are.
        report: is told of every verdict but the failures.
        decision: what may be marked.
        failed: is given the failures, which are yet to be settled; also where an error ends it.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError, OSError: an outage, or an error that is about no run: after the
            retries of the policy. What is marked stands.
    """
    request, among, judged = report.request, decision.among, set[str]()
    if await in_transaction(engine, partial(is_sliceable, request=request)):
        progress = Progress(orphans=decision.orphans, judged=judged)
        try:
            await judge_slices(engine, request, progress, among)
        finally:
            failed += [v for v in progress.verdicts if v.outcome is Outcome.FAILED]
            progress.hand_over_to(report)
    # Whatever slices counted: what they passed over, or a server that crashed forgot, is there.
    await judge_pages(engine, report, among, failed, judged)


async def judge_slices(
    engine: AsyncEngine,
    request: SweepRequest,
    progress: Progress,
    among: Among | None,
    *,
    seconds: float = math.inf,
) -> None:
    """Mark slice by slice, and commit each; in two lanes, of few orphans once there is nothing more
    to be shown.

    Args:
        engine: where the runs are.
        request: the sweep.
        progress: where to go on; it is told what was done, also where an error ends it.
        among: only runs for which this holds.
        seconds: begin no slice after so long.

    Raises:
        sqlalchemy.exc.DBAPIError, OSError: as in :func:`judge_all`.
    """
    give_up_at = time.monotonic() + seconds
    [first, *others] = progress.lanes
    errors = list[Exception]()

    async def along(lane: Lane, *, only_shown: bool = False) -> None:
        # What ends one lane ends the other: it might wait for the first for ever.
        while not lane.is_through and not errors and time.monotonic() < give_up_at:
            if only_shown and progress.show <= 0:
                break
            is_first_only = progress.traffic.gives_way or progress.is_spared
            if lane is not first and not first.is_through and is_first_only:
                await asyncio.sleep(ASK_AGAIN_SECONDS)
                continue
            try:
                await _judge_slice(engine, request, progress, lane, among)
            except Exception as error:
                errors.append(error)

    are_many = progress.orphans >= MANY
    if not are_many:  # the others might leave none to be shown
        await along(first, only_shown=True)
    paced = request.target.orphans_per_second is not None
    may_have_others = not paced and (are_many or progress.show <= 0)
    if may_have_others and not others and not first.is_through:
        # Twice as large: they get on while this process tells what the first has shown.
        progress.lanes += [Lane(2 * first.size, number=n) for n in range(1, LANES)]
    await asyncio.gather(*map(along, progress.lanes))
    if errors:
        raise errors[0]


async def _judge_slice(
    engine: AsyncEngine,
    request: SweepRequest,
    progress: Progress,
    lane: Lane,
    among: Among | None,
) -> None:
    """Mark the next slice, or, if it cannot be marked as one, its first page row by row."""
    shown, left = progress.shows(lane), progress.left_for(lane)
    take = partial(
        _in_lane,
        request=request,
        progress=progress,
        lane=lane,
        left=left,
        among=among,
        shown=shown,
    )
    try:
        part = await in_transaction(engine, take)
    except Exception as error:
        if is_outage(error):
            raise
        async with progress.careful:
            await _judge_page_of(engine, request, progress, lane, left, among, error)
        return
    progress.traffic.own += 1
    lane.is_through = part.is_last
    lane.took = part.seconds
    lane.after = part.last or lane.after
    progress.detected += part.marked  # what was not marked comes up again
    progress.marked += part.marked - len(part.verdicts)
    progress.verdicts += part.verdicts
    progress.show -= len(part.runs)
    if part.seconds > LONG:
        lane.size = max(min(PAGE, lane.size), lane.size // 2)
    elif part.seconds < SHORT:
        lane.size = min(LARGEST_SLICE, lane.size * 2)
    if part.runs:
        log_detected(request, part.runs)
    for verdict in part.verdicts:
        log_verdict(request, verdict)
    if part.marked and not shown:
        log_marked(request, part.marked)


async def _in_lane(
    db: AsyncConnection,
    request: SweepRequest,
    progress: Progress,
    lane: Lane,
    left: Stretch,
    among: Among | None,
    shown: bool,
) -> Slice:
    """Take the next slice in its lane, of a size and after a pause that suit."""
    next_transaction = await enter(db, request.target, lane.number)
    if lane.number == 0:
        progress.traffic.count(next_transaction)
    size, pause = lane.size, 0.0
    if shown:
        size = min(size, max(1, progress.show))
    to_come, lanes = progress.orphans - progress.detected, len(progress.lanes)
    if to_come > 0 and lanes > 1:  # the fewer, the smaller: so they are through at the same time
        size = min(size, max(SHOWN, to_come // (2 * lanes)))
    if request.target.lock is not None:  # each takes a place among the server's locks
        size = min(size, PAGE)
    pace = request.target.orphans_per_second
    if pace is not None:
        size = min(size, math.ceil(pace / PACED))
        pause = size / pace - lane.took
    elif progress.traffic.gives_way:
        _tell_that_it_gives_way(request, progress.traffic)
        size = min(size, SMALL_SLICE)
        pause = min(lane.took * (1 / SHARE - 1), LONGEST_PAUSE_SECONDS)
    await asyncio.sleep(pause)  # within the lane, so that nobody else goes on meanwhile
    return await take_slice(db, request, size=size, stretch=left, among=among, shown=shown)


def _tell_that_it_gives_way(request: SweepRequest, traffic: Traffic) -> None:
    """Once in a sweep."""
    if traffic.since is None:
        traffic.since = time.monotonic()
        log_gives_way(request, round(traffic.others))


async def _judge_page_of(
    engine: AsyncEngine,
    request: SweepRequest,
    progress: Progress,
    lane: Lane,
    left: Stretch,
    among: Among | None,
    error: Exception,
) -> None:
    look = partial(look_at_slice, request=request, size=PAGE, stretch=left, among=among)
    page = await in_transaction(engine, look)
    if not page:  # then it was none of the rows
        raise error
    lane.is_through = len(page) < PAGE
    lane.after = position_of(page[-1])
    page = [run for run in page if run.id not in progress.judged]
    if not page:
        return
    log_detected(request, page)
    given = [v for v in await mark_page(engine, request, page) if v is not None]
    progress.judged |= {v.run.id for v in given}
    progress.detected += len(given)  # a row that somebody holds comes up again
    progress.verdicts += given
    progress.show -= len(given)
