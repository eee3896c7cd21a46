"""Attempt: do something on the database, and all of it again while its error is transient.

The hazard is a retry of half of it. So a try that failed is rolled back as a whole before the next
one begins, and whoever is tried again must read anew what it decides by. The other is to wait for
ever: a server's process that stands still ends no statement, whatever its time-outs say.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import STATEMENT_TIMEOUT_MS, transaction
from orphan_recovery.policy import retrying

T = TypeVar("T")

LONGEST_TRY_SECONDS: Final = 10 * STATEMENT_TIMEOUT_MS / 1000
"""What no try takes by right: it has less than ten statements that may take their whole time."""


async def in_transaction(engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Do ``work`` in a transaction of its own; all of it again while the error is transient.
    Commits.

    Args:
        engine: where.
        work: what to do; it may be begun several times, each in a new transaction.

    Returns:
        What ``work`` returned, once that is committed.

    Raises:
        Exception: what ``work`` or the commit raised at the last try of the policy, or at the
            first that was not transient. Nothing of it stands then, unless it was an
            acknowledgement that was lost.
        TimeoutError: as :func:`retried`.
    """

    async def once() -> T:
        async with transaction(engine) as connection:
            return await work(connection)

    return await retried(once)


async def retried(work: Callable[[], Awaitable[T]]) -> T:
    """Do ``work``; all of it again while the error is transient. Whether it commits is its own.

    Args:
        work: what to do; it may be begun several times.

    Returns:
        What it returned.

    Raises:
        Exception: as :func:`in_transaction`.
        TimeoutError: no try has come to an end within :data:`LONGEST_TRY_SECONDS`.
    """
    async for attempt in retrying():
        with attempt:
            async with bounded(LONGEST_TRY_SECONDS):
                result = await work()
    return result


@asynccontextmanager
async def bounded(seconds: float) -> AsyncIterator[None]:
    """Give what is tried so long, counted here: a server that hangs does not count.

    What was under way on a connection then closes it, so that nobody takes it as it is.

    Raises:
        TimeoutError: the time is up. What was asked may have been heard all the same.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimeoutError(f"the database did not answer within {seconds:g} seconds") from None
