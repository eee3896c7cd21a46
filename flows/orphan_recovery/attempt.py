"""Attempt: do something on the database, and all of it again while its error is transient.

The hazard is a retry of half of it. So a try that failed is rolled back as a whole before the next
one begins, and whoever is tried again must read anew what it decides by.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import transaction
from orphan_recovery.policy import retrying

T = TypeVar("T")


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
    """
    async for attempt in retrying():
        with attempt:
            result = await work()
    return result
