"""Doctor's questions about the table: its columns, rights, statuses, index, trigger and ledger.

The hazard is a table that only looks as it was described: so each is asked of the database itself
(a plan, not the catalogue; a privilege, not a role's name). Reads only.
"""

from typing import Any, Final

from sqlalchemy import Select, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.detect import orphans
from orphan_recovery.doctor.finding import Examined, Finding, Level
from orphan_recovery.ledger import SCHEMA
from orphan_recovery.runs import ROLES
from orphan_recovery.schema.ddl import (
    TRUTH_TRIGGER,
    create_index,
    drop_truth_trigger,
    truth_trigger_is_there,
)
from orphan_recovery.schema.grants import written_columns
from orphan_recovery.schema.migrate import newest_revisions, revisions, unknown_revisions
from orphan_recovery.targets import where


async def look_at_columns(asked: Examined) -> list[Finding]:
    table, about = asked.table, {"table": asked.table.relation.oid}
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
    if table.relation.kind == "r" and await asked.db.scalar(_HAS_CHILDREN, about):
        told = (
            "other tables inherit from it: no index makes a key unique in all of them, and no "
            "trigger of it guards their rows"
        )
        way_out = "see that no key is in two of them; or describe each as a target of its own"
        found.append(Finding(Level.WARNING, "table", told, way_out))
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


_HAS_CHILDREN: Final = text("SELECT EXISTS (SELECT FROM pg_inherits WHERE inhparent = :table)")


async def look_at_privileges(asked: Examined) -> list[Finding]:
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
    hidden = [(table.name, "orphans would be missed")] if table.relation.hides_rows else []
    hidden += [
        (getattr(target, what).table, "who beats there would look silent, so nothing is judged")
        for what, kept in table.elsewhere.items()
        if kept.relation.hides_rows
    ]
    way_out = (
        "give the role (below a view without security_invoker, the view's owner) a policy that "
        "shows it every row (USING (true)), or BYPASSRLS"
    )
    found += [
        Finding(
            Level.FAILURE,
            "privileges",
            f"row security may hide rows of {name} from this role: {so}",
            way_out,
        )
        for name, so in hidden
    ]
    return found


async def look_at_elsewhere(asked: Examined) -> list[Finding]:
    """Whether runs find their signs of life in another table. Where none does, each shows only its
    age, and the run of a worker that beats is taken for silent."""
    table, found = asked.table, []
    for what, kept in table.elsewhere.items():
        named = kept.our_key.is_not(None)
        counted = select(
            func.count().filter(named).label("runs"),
            func.count().filter(named, kept.latest.c.seen_at.is_not(None)).label("heard"),
        )
        statement = counted.select_from(table.reads_from()).where(table.in_flight)
        runs, heard = (await asked.db.execute(statement)).one()
        asks = getattr(table.target, what)
        unlike = kept.unlike and (
            f"run_key {asks.run_key!r} is {kept.unlike[0]}, and key {asks.key!r} of {asks.table!r} "
            f"{kept.unlike[1]}: they are compared as texts, which no index of theirs serves"
        )
        way_out = f"see whether {where(table.target, what)} names the columns that belong together"
        told = f"{heard} of {runs} runs in flight that point to {asks.table!r} find a time there"
        if not runs:
            told = f"no run in flight points to {asks.table!r}"
        if runs and not heard:
            level = Level.FAILURE if unlike else Level.WARNING
            told = f"{told}, so that only their age is known; {unlike or 'their key is not there'}"
            found.append(Finding(level, what, told, way_out))
        elif unlike:
            found.append(Finding(Level.WARNING, what, f"{told}; {unlike}", way_out))
        else:
            found.append(Finding(Level.OK, what, told))
    return found


async def look_at_statuses(asked: Examined) -> list[Finding]:
    table, target = asked.table, asked.table.target
    status = table.text("status").label("status")
    counted = select(status, func.count().label("runs")).group_by(status).order_by(status)
    rows = (await asked.db.execute(counted)).mappings()
    counts = {row["status"]: row["runs"] for row in rows}
    known = {*target.in_flight, *target.waiting, *(target.ends or ()), target.crashed}
    unknown = {s: n for s, n in counts.items() if s not in known}
    found = []
    if counts and target.crashed not in counts and not await _is_provided_for(asked):
        told = f"no row has the status {target.crashed!r} that a mark writes, nor does the table "
        told += "name it: does your application know it?"
        way_out = f"if not, let {where(target, 'crashed')} be what it calls a run that failed"
        found.append(Finding(Level.WARNING, "statuses", told, way_out))
    if not unknown:
        told = ", ".join(f"{s}: {n:,}" for s, n in counts.items()) or "no rows yet"
        return found or [Finding(Level.OK, "statuses", told)]
    told = ", ".join(f"{'NULL' if s is None else repr(s)}: {n:,}" for s, n in unknown.items())
    return [
        *found,
        Finding(
            Level.WARNING,
            "statuses",
            f"the table has statuses that the target does not know: {told}",
            f"add each to in_flight, waiting or terminal of {where(target)}; what is not in "
            "flight is never swept",
        ),
    ]


async def _is_provided_for(asked: Examined) -> bool:
    """Whether the table, without a row that has it, names the status that a mark writes."""
    table, target = asked.table, asked.table.target
    fact = table.facts["status"]
    if target.is_default_table or fact.labels:  # an enum without it was refused before
        return True
    statement = text(
        "SELECT EXISTS (SELECT FROM pg_attribute a JOIN pg_constraint k"
        " ON k.contypid = a.atttypid OR (k.conrelid = a.attrelid AND a.attnum = ANY(k.conkey))"
        " WHERE a.attrelid = :oid AND a.attname = :name"
        " AND (k.contype = 'f'"  # a table of statuses: what is not in it no mark could write
        " OR (k.contype = 'c' AND pg_get_constraintdef(k.oid) ~ :named)))"
    )
    named = f"\\m{target.crashed}\\M"
    if fact.category != "N":
        named = f"***={_literal(target.crashed)}"
    about = {"oid": table.relation.oid, "name": fact.name, "named": named}
    return bool(await asked.db.scalar(statement, about))


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


async def look_at_index(asked: Examined) -> list[Finding]:
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


async def look_at_truth_trigger(asked: Examined) -> list[Finding]:
    target = asked.table.target
    is_there = await asked.db.run_sync(truth_trigger_is_there, asked.table)
    if is_there:
        return [Finding(Level.OK, "truth trigger", "terminal rows are immutable")]
    # As an earlier description had it: its statuses need not be those of today's.
    left = text(
        "SELECT EXISTS (SELECT FROM pg_trigger"
        " WHERE tgrelid = :oid AND tgname = :name AND tgenabled <> 'D')"
    )
    about = {"oid": asked.table.relation.oid, "name": TRUTH_TRIGGER}
    if is_there is None and await asked.db.scalar(left, about):
        return [
            Finding(
                Level.WARNING,
                "truth trigger",
                f"terminal rows are immutable, though {where(target, 'truth_trigger')} does not "
                "ask for that: `migrate` takes nothing away",
                f"set it to true; or, as the owner: {drop_truth_trigger(asked.table)}",
            )
        ]
    if is_there is False:
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


async def look_at_ledger(asked: Examined) -> list[Finding]:
    target = asked.table.target
    there = set(await asked.db.run_sync(revisions))
    if unknown := unknown_revisions(tuple(sorted(there))):
        told = f"at {', '.join(unknown)}, which this version does not know: a newer one was here"
        return [Finding(Level.FAILURE, "ledger", told, "install that version again")]
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
