"""Doctor: whether a target is fit to be swept, line by line, each with the way out. Reads only.

The hazard is a clean bill of health that nobody looked for: so each line is asked of the database
itself, in a read-only transaction (a plan, not the catalogue; a privilege, not a role's name), and
a question that could not be asked is a failure, not an omission.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Select, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import address, describe, make_engine, missing_right
from orphan_recovery.ddl import create_index, truth_trigger_is_there, written_columns
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import look_at_fleet, orphans
from orphan_recovery.doubt import beat_of, look_at_circumstances
from orphan_recovery.ledger import SCHEMA, Ended, holds, sweeps
from orphan_recovery.migrate import newest_revisions, revisions
from orphan_recovery.report import iso, span
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import shortest
from orphan_recovery.runs import ROLES, RunsTable
from orphan_recovery.schedule import DEFAULT_INTERVAL, Schedule, look_up_schedule
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import where

OLDEST_SERVER: Final = 140_000
"""Postgres 14, as ``server_version_num`` has it."""
BEATS: Final = 3
"""Heartbeats that a threshold has to outlast at least, besides one interval between sweeps."""
PATIENCE_MS: Final = 10_000


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


async def examine(target: Target) -> list[Finding]:
    """Look at a target from its description to its last sweep. Reads only, writes nothing.

    Returns:
        The findings, in the order in which an operator would want to mend them.
    """
    schedule = look_up_schedule(target)
    described = "as the default table is" if target == Target() else where(target)
    findings = [Finding(Level.OK, "configuration", f"target {target.name!r}, {described}")]
    try:
        engine = make_engine(address(target))
    except ConfigurationError as error:
        return [*findings, Finding(Level.FAILURE, "database", str(error)), _prefect(schedule)]
    try:
        findings += await _database(engine, target, schedule)
    finally:
        await engine.dispose()
    return [*findings, _prefect(schedule)]


@dataclass(frozen=True, slots=True)
class _Examined:
    """What the questions are about."""

    db: AsyncConnection
    table: RunsTable
    request: SweepRequest
    schedule: Schedule


async def _database(engine: AsyncEngine, target: Target, schedule: Schedule) -> list[Finding]:
    try:
        async with _look(engine) as db:
            findings = [await _server(db)]
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
    for about, ask in _QUESTIONS.items():
        try:
            async with _look(engine) as db:
                findings += await ask(_Examined(db, table, request, schedule))
        except (DBAPIError, OSError) as error:
            told = f"could not be asked: {describe(error)}"
            way_out = "give this role the right to read it, or try again at a quieter time"
            findings.append(Finding(Level.FAILURE, about, told, way_out))
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


async def _columns(asked: _Examined) -> list[Finding]:
    table = asked.table
    found = [
        Finding(
            Level.OK,
            "table",
            f"{table.relation.schema}.{table.relation.name}, a {table.relation.what}; key "
            + ", ".join(f"{f.name} {f.declared}" for r, f in table.facts.items() if r[:3] == "id_"),
        ),
        Finding(
            Level.OK,
            "columns",
            ", ".join(
                f"{'' if role == fact.name else f'{role} = '}{fact.name} {fact.declared}"
                for role, fact in table.facts.items()
                if role in ROLES
            ),
        ),
    ]
    unwritten = [role for role in ("error", "completed_at") if not table.has(role)]
    if unwritten:
        told = f"no column for {', '.join(unwritten)}: a marked run will not say so in its row"
        way_out = f"name them under {where(table.target, 'columns')}; the ledger says it anyway"
        found.append(Finding(Level.WARNING, "columns", told, way_out))
    if not table.has("worker_id"):
        told = "no column for worker_id: that a run changed hands is not seen"
        way_out = f"name it as {where(table.target, 'columns', 'worker_id')}, if there is one"
        found.append(Finding(Level.WARNING, "columns", told, way_out))
    return found


async def _privileges(asked: _Examined) -> list[Finding]:
    table, target = asked.table, asked.table.target
    needed = [("SELECT", f.name) for role, f in table.facts.items() if role != "output_json"]
    needed += [("UPDATE", name) for name in written_columns(table)]
    statement = text("SELECT has_column_privilege(CAST(:table AS oid), :name, :what)")
    lacking = [
        f"{what} ({name})"
        for what, name in needed
        if not await asked.db.scalar(
            statement, {"table": table.relation.oid, "name": name, "what": what}
        )
    ]
    found = []
    way_out = f"have the owner run what `orphan-recovery sql --target {target.name}` prints"
    if lacking:
        told = f"this role lacks {', '.join(lacking)} on {table.name}"
        found.append(Finding(Level.FAILURE, "privileges", told, way_out))
    else:
        told = "this role may read and write what a sweep does"
        found.append(Finding(Level.OK, "privileges", told))
    statement = text("SELECT row_security_active(CAST(:table AS oid))")
    if await asked.db.scalar(statement, {"table": table.relation.oid}):
        found.append(
            Finding(
                Level.FAILURE,
                "privileges",
                f"row security hides rows of {table.name} from this role: orphans would be missed",
                "give the role a policy that shows it every row, or the attribute BYPASSRLS",
            )
        )
    return found


async def _statuses(asked: _Examined) -> list[Finding]:
    table, target = asked.table, asked.table.target
    status = table.text("status").label("status")
    counted = select(status, func.count().label("runs")).group_by(status).order_by(status)
    rows = (await asked.db.execute(counted)).mappings()
    counts = {row["status"]: row["runs"] for row in rows}
    known = {*target.in_flight, *target.waiting, *(target.ends or ()), target.crashed}
    unknown = {s: n for s, n in counts.items() if s not in known}
    if not unknown:
        told = ", ".join(f"{s}: {n:,}" for s, n in counts.items()) or "no rows yet"
        return [Finding(Level.OK, "statuses", told)]
    told = ", ".join(f"{'NULL' if s is None else repr(s)}: {n:,}" for s, n in unknown.items())
    return [
        Finding(
            Level.WARNING,
            "statuses",
            f"the table has statuses that the target does not know: {told}",
            f"add each to in_flight, waiting or terminal of {where(target)}; what is not in "
            "flight is never swept",
        )
    ]


async def _index(asked: _Examined) -> list[Finding]:
    # A small table is scanned whatever there is: what is asked is whether an index could serve.
    await asked.db.execute(text("SET LOCAL enable_seqscan = off"))
    plan = await explain(asked.db, orphans(asked.table, asked.request))
    statement = text(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " WHERE i.indpred IS NOT NULL AND c.relname = ANY(:names)"
    )
    nodes = [node for node in _nodes(plan) if node["Node Type"].endswith(("Scan", "Only Scan"))]
    names = [node["Index Name"] for node in nodes if "Index Name" in node]
    partial = set(await asked.db.scalars(statement, {"names": names}))
    status = asked.table.facts["status"].name
    serving = sorted(
        {
            node["Index Name"]
            for node in nodes
            if "Index Name" in node
            and (node["Index Name"] in partial or status in node.get("Index Cond", ""))
        }
    )
    parts = await asked.db.scalars(
        text("SELECT relname FROM pg_partition_tree(:oid) p JOIN pg_class c ON c.oid = p.relid"),
        {"oid": asked.table.relation.oid},
    )
    whole = {*parts, asked.table.relation.name}
    read_whole = sorted(
        {
            node["Relation Name"]
            for node in nodes
            if node["Node Type"] == "Seq Scan" and node["Relation Name"] in whole
        }
    )
    kept = {str(kept.table.name) for kept in asked.table.elsewhere.values()}
    unserved = sorted({n["Relation Name"] for n in nodes if n["Node Type"] == "Seq Scan"} & kept)
    found = [
        Finding(
            Level.WARNING,
            "index",
            f"every sweep reads the whole of {name} for each run in flight",
            f"create an index on the key column of {name}",
        )
        for name in unserved
    ]
    if serving and not read_whole:
        told = f"detection is served by {', '.join(serving)}"
        return [Finding(Level.OK, "index", told), *found]
    return [
        *found,
        Finding(
            Level.WARNING,
            "index",
            f"no index serves detection: every sweep reads the whole of {asked.table.name}",
            f"`orphan-recovery migrate --target {asked.table.target.name}`, or as the owner: "
            + await asked.db.run_sync(create_index, asked.table),
        ),
    ]


async def _truth(asked: _Examined) -> list[Finding]:
    target = asked.table.target
    if await asked.db.run_sync(truth_trigger_is_there, asked.table):
        return [Finding(Level.OK, "truth trigger", "terminal rows are immutable")]
    if target.is_default_table or target.truth_trigger:
        told = "the truth trigger is missing, disabled, or of another description"
        way_out = f"`orphan-recovery migrate --target {target.name}`"
        return [Finding(Level.FAILURE, "truth trigger", told, way_out)]
    return [
        Finding(
            Level.WARNING,
            "truth trigger",
            "nothing keeps a late worker from overwriting a run that was marked",
            f"have workers write conditionally, or set {where(target, 'truth_trigger')} = true "
            "and migrate, if nothing else changes terminal rows",
        )
    ]


async def _ledger(asked: _Examined) -> list[Finding]:
    target = asked.table.target
    there = set(await asked.db.run_sync(revisions))
    way_out = f"as the owner: `orphan-recovery migrate --target {target.name}`"
    if lacking := [name for name in newest_revisions(target) if name not in there]:
        told = f"the schema {SCHEMA!r} lacks {', '.join(lacking)}"
        return [Finding(Level.FAILURE, "ledger", told, way_out)]
    rights = dict.fromkeys(("sweeps", "verdicts", "holds", "hold_runs"), ("SELECT", "INSERT"))
    statement = text("SELECT has_table_privilege(:table, :what)")
    lacking = [
        f"{what} on {SCHEMA}.{name}"
        for name, needed in rights.items()
        for what in needed
        if not await asked.db.scalar(statement, {"table": f"{SCHEMA}.{name}", "what": what})
    ]
    closing = text("SELECT has_column_privilege(:table, 'ended_at', 'UPDATE')")
    if not await asked.db.scalar(closing, {"table": f"{SCHEMA}.sweeps"}):
        lacking.append(f"UPDATE on {SCHEMA}.sweeps")
    if lacking:
        way_out = f"have the owner run what `orphan-recovery sql --target {target.name}` prints"
        return [Finding(Level.FAILURE, "ledger", f"this role lacks {', '.join(lacking)}", way_out)]
    return [Finding(Level.OK, "ledger", f"at {', '.join(sorted(there))}")]


async def _clocks(asked: _Examined) -> list[Finding]:
    fleet = await look_at_fleet(asked.db, asked.request)
    found = []
    if fleet.ahead:
        workers = ", ".join(fleet.ahead_workers) or "no worker named"
        told = f"{fleet.ahead} runs have a sign of life in the database's future ({workers})"
        way_out = "set those hosts' clocks right, and let workers beat with the database's now()"
        found.append(Finding(Level.FAILURE, "clocks", told, way_out))
    if fleet.undatable:
        some = ", ".join(await _undatable(asked))
        told = f"{fleet.undatable} in flight without any sign of life, never swept: {some}"
        way_out = (
            "see whether the description names all columns with times; give the runs a time of "
            "creation, or end them by hand"
        )
        found.append(Finding(Level.WARNING, "clocks", told, way_out))
    told = f"{fleet.in_flight} in flight, {fleet.exempt} exempt by a rule"
    return found or [Finding(Level.OK, "clocks", f"{told}; no sign of life is in the future")]


async def _undatable(asked: _Examined) -> list[str]:
    table = asked.table
    found = select(table.run_id).select_from(table.reads_from())
    found = found.where(table.in_flight, table.sign_of_life.is_(None)).order_by(*table.key)
    return list(await asked.db.scalars(found.limit(5)))


async def _threshold(asked: _Examined) -> list[Finding]:
    table, target = asked.table, asked.table.target
    if target.lock is not None:
        return []  # no time is the evidence there
    least = shortest(asked.request)
    every = asked.schedule.every or DEFAULT_INTERVAL
    told = f"the shortest threshold is {span(least)}, a sweep comes every {span(every)}"
    beat, how = await beat_of(asked.db, asked.request)
    if beat is None:
        if table.has("heartbeat_at") or "worker_heartbeat" in table.elsewhere:
            way_out = f"set {where(target, 'heartbeat_seconds')}, or ask again while runs beat"
            told = f"{told}; {how}, so that it cannot be held against the heartbeat"
            return [Finding(Level.WARNING, "threshold", told, way_out)]
        way_out = "let runs beat, or keep the threshold above the longest honest run"
        told = f"{told}; runs do not beat, so that age is taken for silence"
        return [Finding(Level.WARNING, "threshold", told, way_out)]
    needed = BEATS * beat + every
    told = f"{told}, and a beat every {span(beat)} ({how})"
    if least < needed:
        minutes = -(-needed // timedelta(minutes=1))
        way_out = (
            f"set the threshold to at least {minutes} minutes ({BEATS} beats and one interval "
            "between sweeps), or let runs beat, or sweep, more often"
        )
        if target.heartbeat_seconds is None:
            way_out += (
                f"; if workers beat more often than that, say so in "
                f"{where(target, 'heartbeat_seconds')}: runs that died of late make the estimate "
                "longer"
            )
        return [Finding(Level.FAILURE, "threshold", f"{told}: too short", way_out)]
    return [Finding(Level.OK, "threshold", told)]


async def _last_sweep(asked: _Examined) -> list[Finding]:
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.sweeps"))) is None:
        return []  # said already: there is no ledger
    statement = select(func.statement_timestamp() - func.max(sweeps.c.ended_at)).where(
        sweeps.c.target == asked.table.target.name, sweeps.c.ended_as == Ended.COMPLETED.value
    )
    age: timedelta | None = await asked.db.scalar(statement)
    way_out = "see whether the schedule, its worker and its database address are well"
    if age is None:
        told = "no sweep of this target has ended well yet"
        first = f"`orphan-recovery sweep --target {asked.table.target.name} --dry-run`"
        return [Finding(Level.WARNING, "last sweep", told, f"{first}, then without --dry-run")]
    told = f"the last sweep that ended well was {span(age)} ago"
    if age > BEATS * (asked.schedule.every or DEFAULT_INTERVAL):
        return [Finding(Level.WARNING, "last sweep", told, way_out)]
    return [Finding(Level.OK, "last sweep", told)]


async def _holds(asked: _Examined) -> list[Finding]:
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.holds"))) is None:
        return []  # said already: there is no ledger
    name = asked.table.target.name
    standing = await asked.db.execute(
        select(holds.c.hold_id, holds.c.opened_at, holds.c.evidence)
        .where(holds.c.target == name, holds.c.ended_at.is_(None))
        .order_by(holds.c.opened_at)
    )
    return [
        Finding(
            Level.WARNING,
            "hold",
            f"hold {hold_id} stands since {iso(opened_at)}: {saw.get('silent_workers')} of "
            f"{saw.get('workers')} {saw.get('counted')} looked dead",
            f"if they are dead, `orphan-recovery approve {hold_id} --target {name}`; if they live, "
            "nothing: it is closed by the first sweep that hears of them",
        )
        for hold_id, opened_at, saw in standing
    ]


async def _contested(asked: _Examined) -> list[Finding]:
    target = asked.table.target
    if await asked.db.scalar(select(func.to_regclass(f"{SCHEMA}.contests"))) is None:
        return []  # said already: there is no ledger
    now = await look_at_circumstances(asked.db, asked.request)
    told = f"{now.contested} verdicts of the last 30 days were contested by a worker that lived"
    if now.contested > target.contest_limit * now.marked:
        told = f"{told}, of {now.marked}: more than the limit of {target.contest_limit:.1%}"
        way_out = "`orphan-recovery summary` says for which tasks; give them a longer threshold"
        return [Finding(Level.WARNING, "contests", told, way_out)]
    return [Finding(Level.OK, "contests", told)]


async def _lock_evidence(asked: _Examined) -> list[Finding]:
    """Whether a session stays with its connection. Through a transaction-mode pooler, another
    transaction in between gets the session that this one had."""
    target = asked.table.target
    if target.lock is None:
        return []
    ask = text("SELECT pg_backend_pid()")
    pids = {await asked.db.scalar(ask)}
    async with asked.db.engine.connect() as between:
        for _ in range(3):
            await asked.db.rollback()
            await between.execute(ask)  # holds a session while ours is given back
            pids.add(await asked.db.scalar(ask))
            await between.rollback()
    if len(pids) > 1:
        told = f"lock evidence goes through a pooler that shares sessions ({len(pids)} seen)"
        way_out = "give workers and sweeps a direct address, or one of a session-mode pooler"
        return [Finding(Level.FAILURE, "lock", told, way_out)]
    held = await asked.db.scalar(
        select(func.count())
        .select_from(asked.table.reads_from())
        .where(asked.table.in_flight, asked.table.is_locked)
    )
    return [Finding(Level.OK, "lock", f"{held} runs in flight have a lock for their {target.lock}")]


_QUESTIONS: Final[dict[str, Callable[[_Examined], Awaitable[list[Finding]]]]] = {
    "columns": _columns,
    "privileges": _privileges,
    "statuses": _statuses,
    "index": _index,
    "truth trigger": _truth,
    "ledger": _ledger,
    "clocks": _clocks,
    "threshold": _threshold,
    "lock": _lock_evidence,
    "hold": _holds,
    "contests": _contested,
    "last sweep": _last_sweep,
}


def _prefect(schedule: Schedule) -> Finding:
    level = Level.WARNING if schedule.way_out else Level.OK
    return Finding(level, "Prefect", schedule.told, schedule.way_out)


async def explain(db: AsyncConnection, statement: Select[Any]) -> dict[str, Any]:
    """The plan of a statement for the values at hand. Does not execute it."""
    compiled = statement.compile(dialect=db.dialect, compile_kwargs={"render_postcompile": True})
    explained = await db.exec_driver_sql(
        f"EXPLAIN (FORMAT JSON) {compiled}", dict(compiled.construct_params())
    )
    [whole] = explained.scalar_one()
    plan: dict[str, Any] = whole["Plan"]
    return plan


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for part in plan.get("Plans", []) for node in _nodes(part))]
