"""Lane: the slices of a table take turns, in all its sweeps together, and give way to other work.

The hazards are fifty workers that start at once and sweep like fifty, and a sweep that holds up
the live runs it is there for. So a slice is only taken by who is in a lane of its table; and who
enters one counts how much has been written by others since it was there last.
"""

import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy import text

from orphan_recovery.database import LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_MS, Executor
from orphan_recovery.describe import runs_table
from orphan_recovery.slices import Position
from orphan_recovery.target import Target

LANES: Final = 2
"""Slices at once, in all sweeps of a table together: while one waits, for the disk or for its
process, the other gets on. One goes from each end, so that neither has to pass over the other's
rows."""
PACED: Final = 20
"""Slices a second where the target has a pace."""

BUSY: Final = 100.0
"""Transactions a second: where others write more, a sweep gives way to them. Several sweeps that
share the lanes write fewer."""
SMALL_SLICE: Final = 50
"""Of a sweep that gives way: a few milliseconds' worth. It takes them in one lane."""
SHARE: Final = 0.01
"""Of its time that the lane works then; for the rest it is kept idle."""
MOST_SECONDS: Final = 300.0
"""For so long a sweep gives way, and then no more: whoever waits for it cannot wait for ever."""
LONGEST_PAUSE_SECONDS: Final = 0.5
"""However slow its last slice was."""

ASK_AGAIN_SECONDS: Final = 0.1
"""Between two looks of the other lanes at whether they still have to wait."""


@dataclass(slots=True)
class Lane:
    """One row of slices of a sweep, each behind the one before: from the oldest on, or, in the
    second lane, from the youngest back."""

    size: int
    """Of its next slice, at full speed."""
    after: Position | None = None
    """Where it has come to."""
    number: int = 0
    took: float = 0.0
    """Its last slice, in seconds."""
    is_through: bool = False


@dataclass(slots=True)
class Traffic:
    """How much others write meanwhile, and whether the sweep gives way to them."""

    own: int = 0
    """Transactions of the sweep itself."""
    others: float = 0.0
    """Those of others, a second, of late."""
    seen: tuple[int, float] | None = None
    """All of others' when they were counted last, and when that was; monotonic."""
    since: float | None = None
    """When the sweep gave way first; monotonic."""

    def count(self, next_transaction: int) -> None:
        """Look again, by the number that the server's next transaction will have."""
        others, now, before = next_transaction - self.own, time.monotonic(), self.seen
        self.seen = others, now
        if before is not None:
            self.others = (others - before[0]) / (now - before[1])

    @property
    def gives_way(self) -> bool:
        waited = 0.0 if self.since is None else time.monotonic() - self.since
        return self.others > BUSY and waited < MOST_SECONDS


async def enter(db: Executor, target: Target, lane: int) -> int:
    """Wait for a lane of a table, behind all who wait already. Does not commit.

    The lane is kept until the transaction ends. For its rest the planner is told to take rows one
    by one, since a slice is a small part of any table that needs slices; and its commit does not
    wait for the disk, since the one that closes the sweep does.

    Args:
        db: a transaction of the caller's, READ COMMITTED.
        target: whose table.
        lane: the number of the lane.

    Returns:
        The number that the server's next transaction that writes will have.

    Raises:
        sqlalchemy.exc.DBAPIError: any database error; the lane was not to be had for as long as a
            statement may take.
    """
    relation = (await runs_table(db, target)).relation
    settings = {"longer": str(STATEMENT_TIMEOUT_MS), "lock": str(LOCK_TIMEOUT_MS)}
    which = {"lane": str(lane), "schema": relation.schema, "name": relation.name}
    await db.execute(_ENTER, {**which, **settings})
    return int((await db.execute(_ENTERED)).scalar_one())


def lock_of(lane: str, schema: str, name: str) -> str:
    """The key of the advisory lock that a lane of a table is, in SQL; so are the arguments."""
    return (
        f"hashtextextended(format('orphan_recovery lane %s of %s.%s', {lane}, {schema}, {name}), 0)"
    )


# For its lane it may have to wait longer than for a row that somebody holds.
_LOCK: Final = lock_of(*(f"CAST(:{part} AS text)" for part in ("lane", "schema", "name")))
_ENTER: Final = text(
    f"""
    SELECT set_config('lock_timeout', :longer, true),
           pg_advisory_xact_lock({_LOCK}),
           set_config('lock_timeout', :lock, true)
    """
)

# The next transaction as it stands when the lane is entered, and so by a statement of its own. And
# the log is flushed once, by the commit that closes the sweep: a server that crashes before forgets
# marks and verdicts alike, and what it forgot is detected again.
_ENTERED: Final = text(
    """
    SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
           set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
           set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
           set_config('enable_sort', 'off', true), set_config('synchronous_commit', 'off', true)
    """
)
