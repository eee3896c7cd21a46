"""Approve: one person's word that the runs of one hold may be marked, for a limited time.

The hazard is a word that reaches further than it was meant: so it is for one hold, which has to be
named by an id that is no other's, and it expires.
"""

from datetime import datetime, timedelta
from typing import Final, NamedTuple
from uuid import UUID

from sqlalchemy import func, insert, literal, select

from orphan_recovery.database import NOW, Executor, Span
from orphan_recovery.describe import runs_table
from orphan_recovery.ledger import approvals, hold_runs, holds
from orphan_recovery.settings import APPROVED_MINUTES, ConfigurationError
from orphan_recovery.target import Target

_APPROVED_FOR: Final = timedelta(minutes=APPROVED_MINUTES)
_NAMED: Final = hold_runs.alias("orphan_recovery_hold_runs")  # as in hold.py


class Approved(NamedTuple):
    """What an approval came to."""

    hold_id: UUID
    until: datetime
    """When the last approval of the hold expires."""
    was_until: datetime | None
    """The same before this one; None if the hold was not released."""


class OpenHold(NamedTuple):
    """A hold that stands, released or not."""

    hold_id: UUID
    target: str


async def open_holds(db: Executor) -> list[OpenHold]:
    """Those of all targets of this ledger, the oldest first. Reads only."""
    there = select(holds.c.hold_id, holds.c.target).where(holds.c.ended_at.is_(None))
    return [OpenHold(*row) for row in await db.execute(there.order_by(holds.c.opened_at))]


def the_one_of(there: list[OpenHold], hold: str) -> OpenHold:
    """That one of them whose id begins so.

    Raises:
        ConfigurationError: none does, or several do; with the ids and targets of all.
    """
    asked = hold.strip().lower()
    found = [one for one in there if asked and str(one.hold_id).startswith(asked)]
    if len(found) == 1:
        return found[0]
    if there:
        told = f"{'more than one' if found else 'no'} open hold begins with {hold!r}"
        listed = ", ".join(f"{one.hold_id} of target {one.target!r}" for one in there)
        told = f"{told if asked else 'name a hold'}; open are: {listed}"
    else:
        told = "no hold is open: nothing is to be approved"
    raise ConfigurationError(
        f"{told}. One that is closed needs no approval: its fleet has recovered, or it was "
        "released and its runs are marked"
    )


async def count_in_flight(db: Executor, target: Target, hold_id: UUID) -> int:
    """How many of the runs that a hold names are in flight still. Reads only.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    table = await runs_table(db, target)
    named = _NAMED.join(table.table, table.is_row(_NAMED.c.run_id))
    counted = select(func.count()).select_from(named)
    of_it = counted.where(_NAMED.c.hold_id == hold_id, table.in_flight)
    return int((await db.execute(of_it)).scalar_one())


async def approve(
    db: Executor, hold: str, *, by: str, lasting: timedelta = _APPROVED_FOR, note: str | None = None
) -> Approved:
    """Release one hold: its runs may be marked until the approval expires. Does not commit.

    One that is released already may be so for longer by this, never for shorter.

    Args:
        db: a transaction of the caller's.
        hold: the hold's id, or as much of its beginning as is unique among open holds.
        by: the person.
        lasting: how long the approval holds.
        note: why, for the ledger.

    Returns:
        Which hold that is, until when it is released, and until when it was before.

    Raises:
        ConfigurationError: there is no such open hold, or several.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    hold_id = the_one_of(await open_holds(db), hold).hold_id
    before = select(func.max(approvals.c.expires_at)).where(
        approvals.c.hold_id == hold_id, approvals.c.expires_at > NOW
    )
    was_until = (await db.execute(before)).scalar_one()
    released = (
        insert(approvals)
        .values(
            hold_id=hold_id,
            approved_at=NOW,
            expires_at=NOW + literal(lasting, Span),
            approved_by=by,
            note=note,
        )
        .returning(approvals.c.expires_at)
    )
    until = (await db.execute(released)).scalar_one()
    return Approved(hold_id, max(until, was_until or until), was_until)
