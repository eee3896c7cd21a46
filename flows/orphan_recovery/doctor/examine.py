"""Doctor: whether a target is fit to be swept, line by line, each with the way out. Reads only.

The hazard is a clean bill of health that nobody looked for: so each line is asked of the database
itself, in a read-only transaction (a plan, not the catalogue; a privilege, not a role's name), and
a question that could not be asked is a failure, not an omission.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import address, describe, make_engine, missing_right
from orphan_recovery.describe import runs_table
from orphan_recovery.doctor.finding import Examined, Finding, Level
from orphan_recovery.doctor.fleet import (
    look_at_clocks,
    look_at_contests,
    look_at_holds,
    look_at_last_sweep,
    look_at_lock,
    look_at_queue,
    look_at_threshold,
)
from orphan_recovery.doctor.schedule import Schedule, look_up_schedule
from orphan_recovery.doctor.table import (
    look_at_columns,
    look_at_elsewhere,
    look_at_index,
    look_at_ledger,
    look_at_privileges,
    look_at_statuses,
    look_at_truth_trigger,
)
from orphan_recovery.doctor.time_zone import look_at_time_zone
from orphan_recovery.request import SweepRequest
from orphan_recovery.settings import ENABLED_VARIABLE, ConfigurationError
from orphan_recovery.sweep import is_enabled
from orphan_recovery.target import Target
from orphan_recovery.targets import where

OLDEST_SERVER: Final = 140_000
"""Postgres 14, as ``server_version_num`` has it."""
PATIENCE_MS: Final = 10_000


async def examine(target: Target) -> list[Finding]:
    """Look at a target from its description to its last sweep. Reads only, writes nothing.

    Returns:
        The findings, in the order in which an operator would want to mend them.
    """
    schedule = look_up_schedule(target)
    described = "as the default table is" if target == Target() else where(target)
    findings = [Finding(Level.OK, "configuration", f"target {target.name!r}, {described}")]
    if not is_enabled():
        told = f"recovery is switched off by {ENABLED_VARIABLE}: no sweep from here does anything"
        way_out = "unset it, or set it to true, to switch it on"
        findings.append(Finding(Level.WARNING, "configuration", told, way_out))
    try:
        engine = make_engine(address(target))
    except ConfigurationError as error:
        return [*findings, Finding(Level.FAILURE, "database", str(error)), _prefect(schedule)]
    try:
        findings += await _database(engine, target, schedule)
    finally:
        await engine.dispose()
    return [*findings, _prefect(schedule)]


async def _database(engine: AsyncEngine, target: Target, schedule: Schedule) -> list[Finding]:
    try:
        async with _look(engine) as db:
            findings = [await _server(db)]
            if findings[0].level is Level.FAILURE:
                return findings  # nothing that is asked of it would be of use
            request = SweepRequest(asked_by="doctor", target=target)
            table = await runs_table(db, target)
    except ConfigurationError as error:
        return [*findings, Finding(Level.FAILURE, "table", str(error))]
    except (DBAPIError, OSError) as error:
        told = describe(error)
        way_out = missing_right(told, target.name) or (
            "see whether the address, the password and the network are right"
        )
        return [Finding(Level.FAILURE, "database", told, way_out)]
    refused: dict[str, list[str]] = {}
    for about, ask in _QUESTIONS.items():
        try:
            async with _look(engine) as db:
                findings += await ask(Examined(db, table, request, schedule))
        except (DBAPIError, OSError) as error:
            told = describe(error)
            if missing_right(told):
                refused.setdefault(told, []).append(about)
                continue
            way_out = "try again at a quieter time"
            findings.append(Finding(Level.FAILURE, about, f"could not be asked: {told}", way_out))
        except ConfigurationError as error:  # such as a schema that is dropped at this moment
            findings.append(Finding(Level.FAILURE, about, str(error)))
    for told, asked in refused.items():  # one right may be what many questions need
        told = f"could not be asked, of {', '.join(asked)}: {told}"
        right = missing_right(told, target.name)
        findings.append(Finding(Level.FAILURE, "privileges", told, right))
    return findings


@asynccontextmanager
async def _look(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as db:
        await db.execute(text("SET TRANSACTION READ ONLY"))
        await db.execute(select(func.set_config("statement_timeout", str(PATIENCE_MS), True)))
        yield db


async def _server(db: AsyncConnection) -> Finding:
    statement = text(
        "SELECT current_setting('server_version_num')::int AS number,"
        " current_setting('server_version') AS version, pg_is_in_recovery() AS standby,"
        " current_user AS who"
    )
    server = (await db.execute(statement)).mappings().one()
    told = f"Postgres {server['version']}, as role {server['who']}"
    if server["standby"]:
        way_out = "name the primary in the target's database address"
        return Finding(Level.FAILURE, "server", f"{told}: a standby, which cannot mark", way_out)
    if server["number"] < OLDEST_SERVER:
        return Finding(Level.FAILURE, "server", told, "Postgres 14 or newer is needed: upgrade it")
    return Finding(Level.OK, "server", told)


_QUESTIONS: Final[dict[str, Callable[[Examined], Awaitable[list[Finding]]]]] = {
    "columns": look_at_columns,
    "privileges": look_at_privileges,
    "elsewhere": look_at_elsewhere,
    "statuses": look_at_statuses,
    "queue": look_at_queue,
    "index": look_at_index,
    "truth trigger": look_at_truth_trigger,
    "ledger": look_at_ledger,
    "clocks": look_at_clocks,
    "time zone": look_at_time_zone,
    "threshold": look_at_threshold,
    "lock": look_at_lock,
    "hold": look_at_holds,
    "contests": look_at_contests,
    "last sweep": look_at_last_sweep,
}


def _prefect(schedule: Schedule) -> Finding:
    level = Level.WARNING if schedule.way_out else Level.OK
    return Finding(level, "Prefect", schedule.told, schedule.way_out)
