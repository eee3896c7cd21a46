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
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy import Row, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import Executor, Span, transaction
from orphan_recovery.events import log_wait
from orphan_recovery.lane import LANES, lock_of
from orphan_recovery.ledger import ledger_there
from orphan_recovery.request import SweepRequest
from orphan_recovery.shared import WHO_ANSWERS
from orphan_recovery.target import split_table

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
LEDGER_SECONDS: Final = 1.0
"""Between two questions about the ledger, while one that it names has a lane: one about the lanes
alone costs less than half as much."""
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
        about = _about(request)
        seen = await _ask(connection, about, called, take=True)
        if seen.answers or (seen.free == LANES and seen.open_with is None):
            return await look(connection, seen.answers)
    log_wait(request)
    ends = time.monotonic() + LONGEST_WAIT_SECONDS
    while True:
        seen, are_dead = await _wait_for_others(engine, about, called, seen, ends)
        async with transaction(engine) as connection:
            if not seen.answers:  # else it needs no lane, and would keep others waiting by it
                seen = await _ask(connection, about, called, take=True)
            is_our_turn = seen.free == LANES and (seen.open_with is None or are_dead)
            if seen.answers or is_our_turn or time.monotonic() >= ends:
                return await look(connection, seen.answers)


async def _wait_for_others(
    engine: AsyncEngine, about: dict[str, Any], called: float, seen: Row[Any], ends: float
) -> tuple[Row[Any], bool]:
    """Return when no other is at work, or another answers, or it is late.

    Returns:
        What was seen last; whether those that are open are no longer to be waited for.
    """
    began = asked = now = time.monotonic()
    free, all_free_since, some_free_since = seen.free, None, None
    # Each question is a transaction by itself, so that no answer holds back a vacuum.
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        while now < ends:
            all_free_since = (all_free_since or now) if free == LANES else None
            some_free_since = (some_free_since or now) if free else None
            if all_free_since is not None and now - all_free_since >= MOMENT_SECONDS:
                return seen, True
            ends_soon = some_free_since is not None and now - some_free_since < MOMENT_SECONDS
            pause = _pause(seen.connections) * (SHARE_AT_THE_END if ends_soon else 1)
            until_it_could_be_through = began + (seen.open_with or 0) / FASTEST - now
            await asyncio.sleep(min(max(pause, until_it_could_be_through), ends - now))
            # While one that the ledger names has a lane, the ledger has mostly nothing to add.
            is_due = seen.open_with is None or time.monotonic() - asked >= LEDGER_SECONDS
            try:
                async with asyncio.timeout(ends - time.monotonic()):
                    if not is_due:
                        free = await _free(connection, seen.lanes)
                    if is_due or free == LANES:
                        seen = await _ask(connection, about, called, take=False)
                        free, asked = seen.free, time.monotonic()
            except TimeoutError:  # somebody has locked the ledger: the look itself tells that
                return seen, False
            if seen.answers or (free == LANES and seen.open_with is None):
                return seen, False
            now = time.monotonic()
    return seen, False


def _pause(connections: int) -> float:
    """Seconds between two questions; not all that wait ask at the same moment."""
    pause = max(SHORTEST_PAUSE_SECONDS, PAUSE_EACH_SECONDS * connections)
    return min(pause, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.5)  # noqa: S311


def _about(request: SweepRequest) -> dict[str, Any]:
    """What each question is told of a sweep."""
    schema, name = split_table(request.target.table)
    about = {"target": request.target.name, "sweep_id": request.sweep_id, "schema": schema}
    return {**about, "name": name, "question": request.question}


async def _ask(db: Executor, about: dict[str, Any], called: float, *, take: bool) -> Row[Any]:
    """Ask, and take what lanes are free until the transaction ends, or none of them."""
    asked = {**about, "called": _since(called), "take": take}
    async with ledger_there():
        return (await db.execute(_QUESTION, asked)).one()


async def _free(db: Executor, lanes: list[int]) -> int:
    """How many of those lanes are free; none is taken."""
    return int((await db.execute(_FREE, {"lanes": lanes})).scalar_one())


def _since(called: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - called)


# Who does not take a lane asks without a trace, so that no two that ask take each other for one at
# work; and by a statement that is a transaction by itself, for until its end nobody could enter.
_FREE: Final = text(
    "SELECT count(*) FILTER (WHERE pg_try_advisory_xact_lock_shared(lane))"
    " FROM unnest(CAST(:lanes AS bigint[])) AS lane"
)


def _is_free(lane: int) -> str:
    """Whether a lane is, in SQL; or is now the caller's."""
    return (
        f"CASE WHEN :take THEN pg_try_advisory_xact_lock({_lock_of(lane)})"
        f" ELSE pg_try_advisory_xact_lock_shared({_lock_of(lane)}) END"
    )


def _lock_of(lane: int) -> str:
    return lock_of(str(lane), "schemas.nspname", "tables.relname")


# Of the table only its name is looked up: who then waits, or need not look, never reads the rest
# of the catalogue. That there is no such table is for the look to say.
_QUESTION: Final = text(
    f"""
    SELECT {" + ".join(f"({_is_free(lane)})::int" for lane in range(LANES))} AS free,
           ARRAY[{", ".join(map(_lock_of, range(LANES)))}] AS lanes,
           -- The orphans of one that the ledger has as open of late; NULL if there is none.
           (SELECT max(coalesce(detected, 0)) FROM orphan_recovery.sweeps
            WHERE target = :target AND ended_at IS NULL AND sweep_id <> :sweep_id
              AND opened_at > statement_timestamp() - CAST(:open_for AS interval)) AS open_with,
           {WHO_ANSWERS} AS answers,
           -- Of ours. By the function: its view would join each to its role and database.
           (SELECT count(*) FROM pg_stat_get_activity(NULL)
            WHERE application_name = current_setting('application_name')
              AND datid = (SELECT oid FROM pg_catalog.pg_database
                           WHERE datname = current_database())) AS connections
    FROM (SELECT to_regclass(concat_ws('.', quote_ident(:schema), quote_ident(:name))) AS oid)
         AS asked
    LEFT JOIN pg_catalog.pg_class AS tables ON tables.oid = asked.oid
    LEFT JOIN pg_catalog.pg_namespace AS schemas ON schemas.oid = tables.relnamespace
    """  # noqa: S608 - of constants
).bindparams(
    bindparam("called", type_=Span),
    bindparam("open_for", OPEN_FOR, type_=Span),
)
"""As text: who waits comes cold, and to build it from parts takes as long as all else until then.
"""
