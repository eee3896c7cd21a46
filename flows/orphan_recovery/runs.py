"""The runs: the table as it stands in the database, and the frozen snapshot of one run.

The hazard is a timestamp read in the wrong zone or a type taken for another. So the table's
columns are read from the database itself, once for each engine, and every time that leaves it
is an aware UTC time whatever the column's type and the session's TimeZone.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any, Final
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    MetaData,
    Table,
    Text,
    and_,
    case,
    cast,
    func,
    inspect,
    literal,
    literal_column,
    or_,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.exc import NoSuchTableError
from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.database import Executor
from orphan_recovery.settings import ConfigurationError

DEFAULT_TABLE: Final = "worker_runs"


class RunStatus(StrEnum):
    """The statuses of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CRASHED = "crashed"


IN_FLIGHT: Final = (RunStatus.QUEUED, RunStatus.RUNNING)
TERMINAL: Final = (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CRASHED)


class Evidence(StrEnum):
    """Where the last sign of life came from."""

    AGE = "age"
    """The run was created, or started, and has not been heard of since."""
    RUN_HEARTBEAT = "run heartbeat"
    """The run's own heartbeat column."""


class Rule(StrEnum):
    """Which rule condemned a run."""

    SILENCE = "silence >= threshold"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRun:
    """What detection saw of one run, and the evidence that condemned it.

    A snapshot, not a live row: it needs no session, it pickles, and marking compares the row as
    it stands then with it. All times are aware, in UTC, and the database's own.
    """

    id: str
    """The run's primary key, as text whatever its type in the table."""
    status: RunStatus
    worker_id: str | None
    """Who held the run; None while it is queued for anyone."""
    tenant_id: str | None
    task: str | None
    attempt: int | None
    is_retry: bool | None
    parent_run_id: str | None
    created_at: datetime | None
    started_at: datetime | None
    heartbeat_at: datetime | None
    sign_of_life: datetime
    """The latest of the three times above."""
    evidence: Evidence
    """Which of them it was."""
    seen_at: datetime
    """The database's time when it was seen."""
    threshold: timedelta
    """The silence that made it an orphan."""
    rule: Rule
    sweep_id: UUID
    """The sweep that saw it. A second mark for the same sweep finds the first one's verdict."""

    @property
    def silence(self) -> timedelta:
        """How long the run had not been heard of when it was seen."""
        return self.seen_at - self.sign_of_life


SIGNS_OF_LIFE: Final = ("created_at", "started_at", "heartbeat_at")
_REQUIRED: Final = (
    "id",
    "status",
    "worker_id",
    "tenant_id",
    "task",
    "attempt",
    "is_retry",
    "parent_run_id",
    "success",
    "error",
    "completed_at",
    *SIGNS_OF_LIFE,
)


@dataclass(frozen=True)
class RunsTable:
    """The runs table with its real column types, and the expressions that read it."""

    table: Table

    @property
    def columns(self) -> Any:
        return self.table.c

    @property
    def name(self) -> str:
        return self.table.name

    def text(self, column: str) -> ColumnElement[str]:
        """A column as text, so that uuid, enum and text keys compare alike."""
        return cast(self.table.c[column], Text)

    def utc(self, column: str) -> ColumnElement[datetime | None]:
        """A timestamp column as an instant; a naive one is read as UTC, never as TimeZone.

        Times before the year 1, ``-infinity`` among them, say nothing and read as NULL: Python
        cannot hold them.
        """
        stored = self.table.c[column]
        instant = stored if _is_aware(stored) else func.timezone("UTC", stored)
        return case((instant >= literal_column("timestamptz '0001-01-02 00:00+00'"), instant))

    def stored(self, column: str, instant: ColumnElement[datetime]) -> ColumnElement[datetime]:
        """An instant as the column stores it: itself, or naive UTC."""
        return instant if _is_aware(self.table.c[column]) else func.timezone("UTC", instant)

    @cached_property
    def in_flight(self) -> ColumnElement[bool]:
        """Literals, not parameters: they are what the partial index is defined by."""
        status = self.table.c.status
        return status.in_([literal_column(f"'{s}'") for s in IN_FLIGHT])

    @cached_property
    def sign_of_life(self) -> ColumnElement[datetime]:
        """The latest time that shows the run was alive; NULL if there is none."""
        return func.greatest(*(self.utc(c) for c in SIGNS_OF_LIFE), type_=TIMESTAMP(timezone=True))

    @cached_property
    def evidence(self) -> ColumnElement[str]:
        return case(
            (self.utc("heartbeat_at") == self.sign_of_life, literal(Evidence.RUN_HEARTBEAT.value)),
            else_=literal(Evidence.AGE.value),
        )

    def silent_since(self, cutoff: ColumnElement[datetime]) -> ColumnElement[bool]:
        """Whether the last sign of life is no later than ``cutoff``.

        The first clause follows from the second, whose time can be no earlier than created_at.
        It is there because an index can serve it.
        """
        created = self.table.c.created_at
        return and_(
            or_(created.is_(None), created <= self.stored("created_at", cutoff)),
            self.sign_of_life <= cutoff,
        )

    def as_key(self, text: ColumnElement[str]) -> ColumnElement[Any]:
        """A key given as text, as the type of the table's own key."""
        return cast(text, self.table.c.id.type)


_known: WeakKeyDictionary[Engine, RunsTable] = WeakKeyDictionary()


async def runs_table(db: Executor) -> RunsTable:
    """The runs table as the database has it. Reads the catalogue once for each engine.

    Raises:
        ConfigurationError: there is no such table, or it lacks a column, or one of its times is
            not a timestamp. Says which, and what to do.
    """
    connection = db if isinstance(db, AsyncConnection) else await db.connection()
    engine = connection.engine.sync_engine
    if engine not in _known:
        _known[engine] = RunsTable(await connection.run_sync(_reflect))
    return _known[engine]


def _reflect(connection: Connection) -> Table:
    try:
        found = inspect(connection).get_columns(DEFAULT_TABLE)
    except NoSuchTableError:
        raise ConfigurationError(
            f"table {DEFAULT_TABLE!r} is not in database {connection.engine.url.database!r} (or "
            "not on its search_path): run `orphan-recovery migrate`, which creates it or adopts "
            "the one you have"
        ) from None
    types = {c["name"]: c["type"] for c in found}
    if missing := [c for c in _REQUIRED if c not in types]:
        raise ConfigurationError(
            f"table {DEFAULT_TABLE!r} has no column {', '.join(map(repr, missing))}: run "
            "`orphan-recovery migrate`, which adds missing columns and rewrites nothing"
        )
    for name in (*SIGNS_OF_LIFE, "completed_at"):
        if not isinstance(types[name], TIMESTAMP):
            raise ConfigurationError(
                f"column {name!r} of table {DEFAULT_TABLE!r} is {types[name]}: a time must be "
                "timestamptz, or timestamp in UTC"
            )
    columns: list[Column[Any]] = [Column(name, kind) for name, kind in types.items()]
    return Table(DEFAULT_TABLE, MetaData(), *columns)


def _is_aware(column: ColumnElement[Any]) -> bool:
    return bool(getattr(column.type, "timezone", False))
