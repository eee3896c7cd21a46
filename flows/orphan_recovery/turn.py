"""Turn: a sweep looks when no other sweep of its table is at work.

The hazard is fifty workers that start at once: each would look at the whole fleet, and then at
what the others have marked meanwhile. So whoever comes while another is at work waits for it,
for a while; and then mostly finds nothing to do. It is a courtesy and no guard: what keeps two
sweeps apart is the row's lock.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import reduce
from operator import add
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy import (
    Boolean,
    Integer,
    Row,
    Select,
    Text,
    Uuid,
    bindparam,
    cast,
    func,
    literal,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import Executor, Span, this_database, transaction
from orphan_recovery.lane import LANES, names_of_lanes
from orphan_recovery.ledger import ledger_there, sweeps
from orphan_recovery.log import logger
from orphan_recovery.request import SweepRequest
from orphan_recovery.shared import who_answers

T = TypeVar("T")

LONGEST_WAIT_SECONDS: Final = 10.0
"""Then it looks all the same, and shares the lanes: the other may take minutes, or be frozen."""
SHORTEST_PAUSE_SECONDS: Final = 0.1
"""Between two questions."""
FASTEST: Final = 150_000
"""Orphans a second that no sweep has reached yet: before another could be through with what it
found, nobody asks again."""
PAUSE_EACH_SECONDS: Final = 0.01
"""For each connection of ours a pause is at least so long: so that all that wait ask a hundred
times a second together, be they five or fifty, and leave the server to the one at work."""
SHARE_AT_THE_END: Final = 0.2
"""Of a pause, for a moment from when a lane is seen free: mostly the other will be through soon.
Where it is not, it keeps to one lane, since it gives way."""
LONGEST_PAUSE_SECONDS: Final = 0.5
"""However many connections there are: workers that beat have them too."""
MOMENT_SECONDS: Final = 0.5
"""How long the lanes stay free before a sweep that the ledger has as open counts as no longer at
work: it may have been killed, or wait before it looks again. Longer than one at work leaves them,
between its look and its first slice, or between two of them."""
OPEN_FOR: Final = timedelta(minutes=1)
"""A sweep that is open for longer is known by its lanes alone: most such were killed."""


async def in_turn(
    engine: AsyncEngine,
    request: SweepRequest,
    look: Callable[[AsyncConnection, UUID | None], Awaitable[T]],
) -> T:
    """Look at the fleet, in a transaction of its own, when no other sweep of the table is at work.

    A dry run waits for nobody.

    Args:
        engine: where the runs are.
        request: whose table.
        look: what to do then. It has the lanes until its transaction ends, unless it waited in
            vain; and is told of the sweep that answers for it (see :mod:`orphan_recovery.shared`),
            if one does: then it may have no lane.

    Returns:
        What ``look`` returned, once that is committed.

    Raises:
        ConfigurationError: there is no ledger.
        sqlalchemy.exc.DBAPIError: any database error; what ``look`` did is rolled back then.
    """
    called = time.monotonic()
    async with transaction(engine) as connection:
        if request.dry_run:
            return await look(connection, None)
        about = await _about(connection, request)
        seen = await _ask(connection, _TAKE, about, called)
        if seen.by or (seen.free == LANES and seen.open_with is None):
            return await look(connection, seen.by)
    fields = {"target": request.target.name, "sweep_id": str(request.sweep_id)}
    logger.info("sweep_waits_for_another", extra=fields)
    ends = time.monotonic() + LONGEST_WAIT_SECONDS
    while True:
        are_dead = await _wait_for_others(engine, about, called, ends)
        async with transaction(engine) as connection:
            seen = await _ask(connection, _TAKE, about, called)
            is_our_turn = seen.free == LANES and (seen.open_with is None or are_dead)
            if seen.by or is_our_turn or time.monotonic() >= ends:
                return await look(connection, seen.by)


async def _wait_for_others(
    engine: AsyncEngine, about: dict[str, Any], called: float, ends: float
) -> bool:
    """Return when no other is at work, or another answers, or it is late.

    Returns:
        Whether those that are open are no longer to be waited for.
    """
    began, all_free_since, some_free_since = time.monotonic(), None, None
    # Each question is a transaction by itself, so that no answer holds back a vacuum.
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        while (now := time.monotonic()) < ends:
            seen = await _ask(connection, _LOOK, about, called)
            if seen.by or (seen.free == LANES and seen.open_with is None):
                return False
            all_free_since = (all_free_since or now) if seen.free == LANES else None
            some_free_since = (some_free_since or now) if seen.free else None
            if all_free_since is not None and now - all_free_since >= MOMENT_SECONDS:
                return True
            ends_soon = some_free_since is not None and now - some_free_since < MOMENT_SECONDS
            pause = _pause(seen.connections) * (SHARE_AT_THE_END if ends_soon else 1)
            until_it_could_be_through = began + (seen.open_with or 0) / FASTEST - now
            await asyncio.sleep(min(max(pause, until_it_could_be_through), ends - now))
    return False


def _pause(connections: int) -> float:
    """Seconds between two questions; not all that wait ask at the same moment."""
    pause = max(SHORTEST_PAUSE_SECONDS, PAUSE_EACH_SECONDS * connections)
    return min(pause, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.5)  # noqa: S311


async def _about(db: Executor, request: SweepRequest) -> dict[str, Any]:
    """What each question is told of a sweep."""
    lanes = enumerate(await names_of_lanes(db, request.target))
    about = {"target": request.target.name, "sweep_id": request.sweep_id}
    return {**{f"lane_{n}": name for n, name in lanes}, **about, "question": request.question}


async def _ask(
    db: Executor, question: Select[Any], about: dict[str, Any], called: float
) -> Row[Any]:
    async with ledger_there():
        return (await db.execute(question, {**about, "called": _since(called)})).one()


def _since(called: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - called)


def _question(try_lock: Callable[..., Any]) -> Select[Any]:
    """How many lanes are free; how many orphans another sweep has found that the ledger has as
    open of late, NULL if there is none; and which other has seen what this one would."""
    lanes = [bindparam(f"lane_{number}", type_=Text()) for number in range(LANES)]
    tried = [try_lock(func.hashtextextended(lane, 0), type_=Boolean()) for lane in lanes]
    found = select(func.max(func.coalesce(sweeps.c.detected, 0))).where(
        sweeps.c.target == bindparam("target", type_=Text()),
        sweeps.c.opened_at > func.statement_timestamp() - literal(OPEN_FOR, Span),
        sweeps.c.ended_at.is_(None),
        sweeps.c.sweep_id != bindparam("sweep_id", type_=Uuid()),
    )
    return select(
        reduce(add, (cast(lane, Integer) for lane in tried)).label("free"),
        found.scalar_subquery().label("open_with"),
        who_answers().label("by"),
    )


_SESSIONS = func.pg_stat_get_activity(None).table_valued("application_name", "datid")
# The function itself: the view would join each session to its role and database, at each question.
_CONNECTIONS: Final = (
    select(func.count())
    .select_from(_SESSIONS)
    .where(_SESSIONS.c.application_name == func.current_setting("application_name"))
    .where(_SESSIONS.c.datid == this_database())
    .scalar_subquery()
    .label("connections")
)
_TAKE: Final = _question(func.pg_try_advisory_xact_lock)
"""What it can take it keeps until the transaction ends."""
_LOOK: Final = _question(func.pg_try_advisory_xact_lock_shared).add_columns(_CONNECTIONS)
"""To be asked without a transaction: in one, nobody could enter a lane until it ends. Further, how
many connections of ours there are."""
