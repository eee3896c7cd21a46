"""Shared: one look answers for every sweep that was asked the same before it.

The hazard is an orphan that is lost because each sweep leaves it to another. So what another saw
is taken over only if it looked after this one was called, looked for the same, and judged all that
it found, without a doubt: then whoever called could not have been told more by a look of its own.
So of fifty workers that start at once one or two look, and the others read one row.
"""

from typing import Any
from uuid import UUID

from sqlalchemy import ScalarSelect, Text, bindparam, func, select

from orphan_recovery.database import Executor, Span
from orphan_recovery.detect import Fleet
from orphan_recovery.ledger import Ended, sweeps


def who_answers() -> ScalarSelect[Any]:
    """The sweep whose look answers for another's, or NULL; the latest of them.

    Of the parameters ``target`` and ``question`` (see :attr:`SweepRequest.question`) of the other,
    and ``called``: how long ago it was called. That span is the caller's own measure, and the only
    thing here that is not the database's; where its clock stands still, or the question is long on
    its way, it is too short, and a look that would have answered does not.
    """
    now = func.statement_timestamp()
    called = now - bindparam("called", type_=Span)
    return (
        select(sweeps.c.sweep_id)
        .where(sweeps.c.target == bindparam("target", type_=Text()))
        .where(sweeps.c.question == bindparam("question", type_=Text()))
        .where(sweeps.c.opened_at > called, sweeps.c.opened_at <= now)
        # What failed, was held, or is left to the next sweep is to be seen by each.
        .where(sweeps.c.ended_as == Ended.COMPLETED.value, sweeps.c.looked_twice.is_(None))
        .where(sweeps.c.undatable == 0, sweeps.c.ahead == 0)
        .order_by(sweeps.c.opened_at.desc())
        .limit(1)
        .scalar_subquery()
    )


async def fleet_left_by(db: Executor, sweep_id: UUID) -> Fleet:
    """What a sweep that judged all it found saw, less what it marked. Reads the ledger only."""
    left = sweeps.c.in_flight - sweeps.c.marked
    found = select(left.label("in_flight"), sweeps.c.exempt, sweeps.c.opened_at.label("seen_at"))
    row = (await db.execute(found.where(sweeps.c.sweep_id == sweep_id))).mappings().one()
    return Fleet(**row, orphans=0, beating=0, undatable=0, ahead=0, ahead_workers=[])
