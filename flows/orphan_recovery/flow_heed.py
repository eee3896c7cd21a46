"""Heed: record what a person answered about a hold, in Prefect's UI.

The hazard is a yes that was given in another hour: a worker may pick the resumed flow run up days
later, and somebody may retry it. So an approval counts from when it was given, is refused once
that is over, and is recorded once, however often it is heeded. Prefect's clock can only make it
shorter.
"""

from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

from prefect import get_run_logger
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.approve import approve
from orphan_recovery.attempt import in_transaction
from orphan_recovery.flow_hold import ENDED, LEAVE_THEM, Given
from orphan_recovery.flow_tasks import errors_in_a_line
from orphan_recovery.ledger import approvals, holds
from orphan_recovery.words import iso, span

_ALIKE = timedelta(seconds=5)
"""By how much two approvals by the same answer may differ, for it is heeded twice at once."""


class Heeded(NamedTuple):
    """What an answer came to."""

    told: str
    """For the log, and for the message of the flow run's state."""
    is_released: bool = False
    is_left: bool = False
    """Its runs are left alone, as the person wished: there is nothing more to do."""


async def heed(engine: AsyncEngine, target: str, given: Given) -> Heeded:
    """Record an answer, and forget it; one that leaves the runs of an open hold alone is kept.

    Raises:
        DatabaseError: it could not be recorded; the answer is kept for the next sweep.
    """
    with errors_in_a_line():
        heeded = await in_transaction(engine, partial(_record, target=target, given=given))
    if not heeded.is_left:
        await given.forget()  # after the commit: an answer is rather heeded twice than lost
        get_run_logger().warning("%s", heeded.told)
    return heeded


async def _record(db: AsyncConnection, target: str, given: Given) -> Heeded:
    """The same within a transaction. Does not commit."""
    answer, hold_id = given.answer, given.hold_id
    if hold_id is None:
        return Heeded(
            "the answer was not heeded, for this flow run has lost the tag that names its hold: "
            "release it with `orphan-recovery approve HOLD`; `orphan-recovery doctor` names it"
        )
    now = func.statement_timestamp(type_=TIMESTAMP(timezone=True))
    seen = await db.execute(select(holds.c.ended_as, now).where(holds.c.hold_id == hold_id))
    row = seen.one_or_none()
    if row is None:
        return Heeded(f"the answer was not heeded: there is no hold {hold_id} in the ledger")
    ended_as, right_now = row
    if ended_as is not None:
        return Heeded(f"no answer was needed: hold {hold_id} has ended: {ENDED[ended_as]}")
    if answer.decision == LEAVE_THEM:
        return Heeded(f"hold {hold_id} stands: {answer.in_words(hold_id, target)}", is_left=True)
    lasting = timedelta(minutes=answer.for_minutes)
    until = min(given.at, right_now) + lasting
    if until <= right_now:
        return Heeded(
            f"the approval by {answer.your_name} of {iso(given.at)} was for {span(lasting)} and "
            f"has expired before a sweep could heed it: `orphan-recovery approve {hold_id} "
            f"--target {target}`, or answer the next one that asks"
        )
    by = f"{answer.your_name}, in Prefect's UI"
    if not await _is_recorded(db, given, by, until):
        await approve(db, str(hold_id), by=by, lasting=until - right_now, note=answer.note or None)
    return Heeded(f"hold {hold_id} was released by {answer.your_name}", is_released=True)


async def _is_recorded(db: AsyncConnection, given: Given, by: str, until: datetime) -> bool:
    """Whether this answer has released the hold already, such as for another sweep."""
    same = select(approvals.c.hold_id).where(
        approvals.c.hold_id == given.hold_id,
        approvals.c.approved_by == by,
        approvals.c.expires_at.between(until - _ALIKE, until + _ALIKE),
    )
    return (await db.execute(same)).first() is not None
