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
    """Do ``work`` in a transaction of its own; all of it again while the error is transient."""

    async def once() -> T:
        async with transaction(engine) as connection:
            return await work(connection)

    return await retried(once)


async def retried(work: Callable[[], Awaitable[T]]) -> T:
    """Do ``work``; all of it again while the error is transient."""
    async for attempt in retrying():
        with attempt:
            result = await work()
    return result
