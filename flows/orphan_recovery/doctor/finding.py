"""Finding: one line of the doctor's report, and what its questions are about."""

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.doctor.schedule import Schedule
from orphan_recovery.request import SweepRequest
from orphan_recovery.runs import RunsTable


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    about: str
    told: str
    way_out: str | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """What the questions are about."""

    db: AsyncConnection
    """In a read-only transaction."""
    table: RunsTable
    request: SweepRequest
    schedule: Schedule
