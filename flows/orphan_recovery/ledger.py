"""The ledger: the append-only tables of sweeps and their verdicts.

The hazard is a history that can be edited: a trigger refuses to change or delete what is in it.
The tables live in a schema of their own, beside the runs, and are made by the migrations; here is
what a statement needs to know of them. See :mod:`orphan_recovery.record` for what is written.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Final

from sqlalchemy import BigInteger, Column, Interval, MetaData, Table, Text, Uuid, and_, func, select
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.exc import DBAPIError

from orphan_recovery.database import Executor
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.targets import no_file_told

SCHEMA: Final = "orphan_recovery"
_NO_SUCH_TABLE: Final = ("42P01", "3F000")

_AWARE = TIMESTAMP(timezone=True)
_metadata = MetaData(schema=SCHEMA)

sweeps: Final = Table(
    "sweeps",
    _metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("target", Text),
    Column("table_name", Text),
    Column("asked_by", Text),
    Column("reason", Text),
    Column("threshold", Interval),
    Column("scope", JSONB),
    Column("version", Text),
    Column("question", Text),
    Column("seen_by", Uuid),
    Column("opened_at", _AWARE),
    Column("in_flight", BigInteger),
    Column("undatable", BigInteger),
    Column("ahead", BigInteger),
    Column("exempt", BigInteger),
    Column("timeline", Text),
    Column("looked_twice", Text),
    Column("hold", Uuid),
    Column("ended_at", _AWARE),
    Column("ended_as", Text),
    Column("detected", BigInteger),
    Column("marked", BigInteger),
    Column("missed", BigInteger),
    Column("failed", BigInteger),
    Column("error", Text),
)

verdicts: Final = Table(
    "verdicts",
    _metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("target", Text),
    Column("outcome", Text),
    Column("worker_id", Text),
    Column("tenant_id", Text),
    Column("task", Text),
    Column("status_seen", Text),
    Column("sign_of_life", _AWARE),
    Column("evidence", Text),
    Column("silence", Interval),
    Column("threshold", Interval),
    Column("rule", Text),
    Column("reason", Text),
    Column("judged_at", _AWARE),
    Column("found", JSONB),
    Column("error", Text),
)


contests: Final = Table(
    "contests",
    _metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("target", Text),
    Column("worker_id", Text),
    Column("reported_status", Text),
    Column("reported_at", _AWARE),
)

SAME_VERDICT: Final = and_(
    contests.c.sweep_id == verdicts.c.sweep_id, contests.c.run_id == verdicts.c.run_id
)
"""Which verdict a contest is about."""

holds: Final = Table(
    "holds",
    _metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("target", Text),
    Column("sweep_id", Uuid),
    Column("opened_at", _AWARE),
    Column("evidence", JSONB),
    Column("ended_at", _AWARE),
    Column("ended_as", Text),
    Column("ended_by", Uuid),
)

hold_runs: Final = Table(
    "hold_runs",
    _metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("run_id", Text, primary_key=True),
)

approvals: Final = Table(
    "approvals",
    _metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("approved_at", _AWARE, primary_key=True),
    Column("expires_at", _AWARE),
    Column("approved_by", Text),
    Column("note", Text),
)


class Ended(StrEnum):
    """How a sweep ended."""

    COMPLETED = "completed"
    """Every detected orphan has its verdict, and none failed."""
    FAILED = "failed"
    """A run could not be marked, or the sweep could not go on. Its error says why."""
    HELD = "held"
    """Too much of the fleet looked dead: nothing of that was marked, and a person was asked."""
    DIED = "died"
    """It was killed; a later sweep closed it."""
    DIRECT = "direct"
    """No sweep at all: a caller of mark_run_as_crashed brought its own runs."""


@asynccontextmanager
async def ledger_there() -> AsyncIterator[None]:
    """Say what is to be done where what is asked of the ledger fails because there is none.

    Raises:
        ConfigurationError: the schema is not there. The transaction is then to be rolled back.
    """
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in _NO_SUCH_TABLE:
            raise
        raise _no_ledger() from error


async def require_ledger(db: Executor) -> None:
    """Refuse to go on without a ledger: a mark that leaves no evidence is not made.

    Raises:
        ConfigurationError: the schema is not there.
    """
    if (await db.execute(select(func.to_regclass(f"{SCHEMA}.verdicts")))).scalar_one() is None:
        raise _no_ledger()


def _no_ledger() -> ConfigurationError:
    return ConfigurationError(
        f"the ledger, schema {SCHEMA!r}, is not in this database: run `orphan-recovery migrate`, "
        "which creates it" + no_file_told()
    )
