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

from sqlalchemy import (
    Boolean,
    Row,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    column,
    func,
    literal,
    select,
    table,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import Executor, Span, transaction
from orphan_recovery.lane import LANES, names_of_lanes
from orphan_recovery.ledger import ledger_there, sweeps
from orphan_recovery.log import logger
from orphan_recovery.request import SweepRequest

T = TypeVar("T")

LONGEST_WAIT_SECONDS: Final = 10.0
"""Then it looks all the same, and shares the lanes: the other may take minutes, or be frozen."""
SHORTEST_PAUSE_SECONDS: Final = 0.05
"""Between two questions."""
PAUSE_EACH_SECONDS: Final = 0.01
"""For each connection of ours a pause is at least so long: so that all that wait ask a hundred
times a second together, be they five or fifty, and leave the server to the one at work."""
LONGEST_PAUSE_SECONDS: Final = 0.5
"""However many connections there are: workers that beat have them too."""
MOMENT_SECONDS: Final = 0.5
"""How long the lanes stay free before a sweep that the ledger has as open counts as no longer at
work: it may have been killed, or wait before it looks again. Longer than one at work leaves them,
between its look and its first slice, or between two of them."""
OPEN_FOR: Final = timedelta(minutes=1)
"""A sweep that is open for longer is known by its lanes alone: most such were killed."""


async def in_turn(
    engine: AsyncEngine, request: SweepRequest, look: Callable[[AsyncConnection], Awaitable[T]]
) -> T:
    """Look at the fleet, in a transaction of its own, when no other sweep of the table is at work.

    A dry run waits for nobody.

    Args:
        engine: where the runs are.
        request: whose table.
        look: what to do then. It has the lanes until its transaction ends, unless it waited.

    Returns:
        What ``look`` returned, once that is committed.

    Raises:
        ConfigurationError: there is no ledger.
        sqlalchemy.exc.DBAPIError: any database error; what ``look`` did is rolled back then.
    """
    async with transaction(engine) as connection:
        if request.dry_run or all(await _ask(connection, request, _TAKE)):
            return await look(connection)
    fields = {"target": request.target.name, "sweep_id": str(request.sweep_id)}
    logger.info("sweep_waits_for_another", extra=fields)
    await _wait_for_others(engine, request)
    async with transaction(engine) as connection:
        return await look(connection)


async def _wait_for_others(engine: AsyncEngine, request: SweepRequest) -> None:
    """Return when no other is at work, or it is no longer to be waited for."""
    began, free_since = time.monotonic(), None
    # Each question is a transaction by itself, so that no answer holds back a vacuum.
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        while (now := time.monotonic()) - began < LONGEST_WAIT_SECONDS:
            are_free, nobody_is_open, connections = await _ask(connection, request, _LOOK)
            if not are_free:
                free_since = None
            elif nobody_is_open or now - (free_since := free_since or now) >= MOMENT_SECONDS:
                return
            pause = max(SHORTEST_PAUSE_SECONDS, PAUSE_EACH_SECONDS * connections)
            pause = min(pause, LONGEST_PAUSE_SECONDS)
            # Not all that wait at the same moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311


async def _ask(db: Executor, request: SweepRequest, question: Select[Any]) -> Row[Any]:
    lanes = enumerate(await names_of_lanes(db, request.target))
    about = {"target": request.target.name, "sweep_id": request.sweep_id}
    async with ledger_there():
        found = await db.execute(question, {**{f"lane_{n}": name for n, name in lanes}, **about})
    return found.one()


def _question(try_lock: Callable[..., Any]) -> Select[Any]:
    """Whether all lanes are free, and whether the ledger has no other sweep as open of late."""
    lanes = [bindparam(f"lane_{number}", type_=Text()) for number in range(LANES)]
    tried = [try_lock(func.hashtextextended(lane, 0), type_=Boolean()) for lane in lanes]
    another = select(sweeps.c.sweep_id).where(
        sweeps.c.target == bindparam("target", type_=Text()),
        sweeps.c.opened_at > func.statement_timestamp() - literal(OPEN_FOR, Span),
        sweeps.c.ended_at.is_(None),
        sweeps.c.sweep_id != bindparam("sweep_id", type_=Uuid()),
    )
    return select(and_(*tried), ~another.exists())


_CONNECTIONS: Final = (
    select(func.count())
    .select_from(table("pg_stat_activity", schema="pg_catalog"))
    .where(column("application_name") == func.current_setting("application_name"))
    .where(column("datname") == func.current_database())
    .scalar_subquery()
)
_TAKE: Final = _question(func.pg_try_advisory_xact_lock)
"""What it can take it keeps until the transaction ends."""
_LOOK: Final = _question(func.pg_try_advisory_xact_lock_shared).add_columns(_CONNECTIONS)
"""To be asked without a transaction: in one, nobody could enter a lane until it ends. Further, how
many connections of ours there are."""
