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
from typing import Final, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import transaction
from orphan_recovery.lane import are_free, enter_all
from orphan_recovery.log import logger
from orphan_recovery.request import SweepRequest

T = TypeVar("T")

LONGEST_WAIT_SECONDS: Final = 10.0
"""Then it looks all the same, and shares the lanes: the other may take minutes, or be frozen."""
SHORTEST_PAUSE_SECONDS: Final = 0.05
"""Between two questions."""
PAUSE_SHARE: Final = 0.05
"""Of the time waited so far, a pause is at least: so fifty that wait do not ask much, and a short
wait is not drawn out."""
BETWEEN_SLICES_SECONDS: Final = 0.02
"""Longer than a sweep that is at work leaves its lanes free."""


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
        sqlalchemy.exc.DBAPIError: any database error; what ``look`` did is rolled back then.
    """
    async with transaction(engine) as connection:
        if request.dry_run or await enter_all(connection, request.target):
            return await look(connection)
    fields = {"target": request.target.name, "sweep_id": str(request.sweep_id)}
    logger.info("sweep_waits_for_another", extra=fields)
    await _wait_for_others(engine, request)
    async with transaction(engine) as connection:
        return await look(connection)


async def _wait_for_others(engine: AsyncEngine, request: SweepRequest) -> None:
    """Return when the lanes are free. Between two slices they are so for a moment: so ask twice."""
    began, was_free = time.monotonic(), False
    # Each question is a transaction by itself, so that no answer holds back a vacuum.
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        while (waited := time.monotonic() - began) < LONGEST_WAIT_SECONDS:
            is_free = await are_free(connection, request.target)
            if is_free and was_free:
                return
            was_free = is_free
            pause = max(SHORTEST_PAUSE_SECONDS, PAUSE_SHARE * waited)
            # Not all that wait at the same moment.
            pause *= random.uniform(0.5, 1.5)  # noqa: S311
            await asyncio.sleep(BETWEEN_SLICES_SECONDS if is_free else pause)
