"""Shared: one look answers for every sweep that was asked the same before it.

The hazard is an orphan that is lost because each sweep leaves it to another. So what another saw
is taken over only if it looked after this one was called, looked for the same, and judged all that
it found, without a doubt: then whoever called could not have been told more by a look of its own.
So of fifty workers that start at once one or two look, and the others read one row.
"""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import select

from orphan_recovery.catalog import Relation
from orphan_recovery.database import Executor
from orphan_recovery.detect import Fleet
from orphan_recovery.ledger import sweeps


def question_about(question: str | None, relation: Relation) -> str | None:
    """What a sweep asked, of which table: one name may mean another on another search_path."""
    return None if question is None else f"{question} {relation.schema}.{relation.name}"


WHO_ANSWERS: Final = """
    (SELECT sweep_id FROM orphan_recovery.sweeps
     WHERE target = :target
       AND question = CAST(:question AS text) || ' ' || schemas.nspname || '.' || tables.relname
       AND seen_by IS NULL  -- it looked itself: what was marked is told there
       AND opened_at > statement_timestamp() - CAST(:called AS interval)
       AND opened_at <= statement_timestamp()
       -- What failed, is held, or is left to the next sweep is to be seen by each.
       AND ended_as = 'completed' AND looked_twice IS NULL AND undatable = 0 AND ahead = 0
       AND NOT EXISTS (SELECT FROM orphan_recovery.holds
                       WHERE target = :target AND ended_at IS NULL)
     ORDER BY opened_at DESC LIMIT 1)
"""
"""The sweep whose look answers for another's, or NULL; the latest of them.

Of the parameters ``target`` and ``question`` (see :attr:`SweepRequest.question`) of the other, of
its table by ``schemas.nspname`` and ``tables.relname``, and of ``called``: how long ago it was
called. That span is the caller's own measure, and the only thing
here that is not the database's; where its clock stands still, or the question is long on its way,
it is too short, and a look that would have answered does not.
"""


async def left_by(db: Executor, sweep_id: UUID) -> tuple[Fleet, str | None]:
    """What a sweep that judged all it found saw, less what it marked; and the timeline that it saw.
    Reads the ledger only, of a sweep that has ended.

    Raises:
        sqlalchemy.exc.DBAPIError: any database error.
    """
    left = sweeps.c.in_flight - sweeps.c.marked
    found = select(left, sweeps.c.exempt, sweeps.c.opened_at, sweeps.c.timeline)
    row = (await db.execute(found.where(sweeps.c.sweep_id == sweep_id))).one()
    in_flight, exempt, seen_at, timeline = row
    nothing: dict[str, Any] = {"orphans": 0, "beating": 0, "undatable": 0, "ahead": 0}
    fleet = Fleet(in_flight=in_flight, exempt=exempt, seen_at=seen_at, ahead_workers=[], **nothing)
    return fleet, timeline
