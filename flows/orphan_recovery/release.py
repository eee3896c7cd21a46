"""Release: find a hold in the ledgers of all targets, and approve it.

The hazard is a hold that is not found because a database on the way to it could not be asked, and
an id that means two. So each database is asked once, all at the same time; what was not asked is
named; and of several that fit none is released.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.approve import (
    Approved,
    OpenHold,
    approve,
    count_in_flight,
    open_holds,
    the_one_of,
)
from orphan_recovery.database import address, describe, make_engine, transaction
from orphan_recovery.ledger import ledger_there
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target


@dataclass(frozen=True, slots=True)
class Found:
    """The one open hold that was meant."""

    hold: OpenHold
    url: URL
    """In whose ledger it is."""
    target: Target | None
    """Whose hold it is; None if that is none of those that were asked."""
    not_asked: list[str]
    """A line for each ledger that could not be asked."""


class NotAsked(ConfigurationError):  # noqa: N818 - named for what an operator reads
    """The hold is in no ledger that could be asked."""


async def find_hold(targets: list[Target], hold: str) -> Found:
    """The one open hold, of any of these targets, whose id begins so. Reads only.

    Args:
        targets: in whose ledgers to look. What goes wrong with the only one is raised; with one of
            several it is told.
        hold: the hold's id, or as much of its beginning as is unique.

    Raises:
        ConfigurationError: there is no such open hold, or several; :class:`NotAsked` if some of the
            ledgers could not be asked for it.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    by_url, not_asked, alone = dict[URL, list[Target]](), list[str](), len(targets) == 1
    for target in targets:
        try:
            by_url.setdefault(address(target), []).append(target)
        except ConfigurationError as error:
            if alone:
                raise
            not_asked.append(_not_asked([target], str(error)))

    async def asked(url: URL) -> list[OpenHold]:
        try:
            async with _ledger_at(url) as db:
                return await open_holds(db)
        except (DBAPIError, OSError, ConfigurationError) as error:
            if alone:
                raise
            not_asked.append(_not_asked(by_url[url], _described(error)))
            return []

    # Of two addresses of one database, either will do.
    answers = zip(by_url, await asyncio.gather(*map(asked, by_url)), strict=True)
    place = {found.hold_id: (found, url) for url, holds in answers for found in holds}
    try:
        meant = the_one_of([found for found, _ in place.values()], hold)
    except ConfigurationError as error:
        if not not_asked:
            raise
        raise NotAsked("; ".join([str(error), *not_asked])) from None
    _, url = place[meant.hold_id]
    whose = next((target for target in by_url[url] if target.name == meant.target), None)
    return Found(meant, url, whose, not_asked)


async def release(
    found: Found, *, by: str, lasting: timedelta, note: str | None
) -> tuple[Approved, int | None]:
    """Approve it. Commits.

    Args:
        found: the hold.
        by: the person.
        lasting: how long the approval holds.
        note: why, for the ledger.

    Returns:
        What the approval came to; and how many runs of the hold are in flight still, or None where
        that could not be asked.

    Raises:
        ConfigurationError: the hold was closed meanwhile.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    hold_id = found.hold.hold_id
    async with _ledger_at(found.url) as db:
        approved = await approve(db, str(hold_id), by=by, lasting=lasting, note=note)
    in_flight = None
    if found.target is not None:
        with suppress(DBAPIError, OSError, ConfigurationError):  # released it is, all the same
            async with _ledger_at(found.url) as db:
                in_flight = await count_in_flight(db, found.target, hold_id)
    return approved, in_flight


@asynccontextmanager
async def _ledger_at(url: URL) -> AsyncIterator[AsyncConnection]:
    """A transaction of our own there."""
    engine = make_engine(url, connections=1)
    try:
        async with transaction(engine) as db, ledger_there():
            yield db
    finally:
        await engine.dispose()


def _not_asked(targets: list[Target], why: str) -> str:
    names = ", ".join(repr(target.name) for target in targets)
    return f"the ledger of target {names} was not asked ({why})"


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigurationError) else describe(error)
