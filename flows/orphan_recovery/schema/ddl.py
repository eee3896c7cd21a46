"""The statements that `migrate` executes on a target's table, and that `sql` prints for a DBA.

The hazard is DDL, which takes no parameters: a name or a status would become SQL text. So every
one is composed by psycopg as an identifier or a literal, quoted as the server would, and nothing
is ever pasted. What is there already is left alone.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from psycopg import sql
from sqlalchemy import Connection, text

from orphan_recovery.catalog import Relation, look_up
from orphan_recovery.ledger import SCHEMA
from orphan_recovery.runs import RunsTable
from orphan_recovery.schema.common import FROZEN, for_all_targets, is_guarded
from orphan_recovery.settings import ConfigurationError

TRUTH_TRIGGER: Final = "prevent_worker_run_mutation"


@dataclass(frozen=True, slots=True)
class Change:
    """One step of what `migrate` does to a table."""

    why: str
    statements: tuple[sql.Composed, ...]
    alone: bool = False
    """Each statement outside any transaction: a concurrent build."""


def changes(connection: Connection, runs: RunsTable) -> list[Change]:
    """What the table lacks: the index of what is in flight, that of what is crashed, the trigger.

    They are made for all targets that sweep the table. Reads the catalogue only.

    Raises:
        ConfigurationError: something else has one's name, or the targets do not go together.
    """
    runs = for_all_targets(connection, runs)
    wanted = [*_triggers(connection, runs), *_indexes(connection, runs)]
    return [change for change in wanted if change.statements]


def undoing(connection: Connection, runs: RunsTable) -> list[Change]:
    """The way back: drop what :func:`changes` may have made. Reads the catalogue only."""
    undone = []
    for name in _index_names(runs):
        if _index_of(connection, runs.relation.oid, name, None) is not None:
            drop = compose("DROP INDEX {}", _qualified(runs.relation.schema, name))
            undone.append(Change(f"drop index {name}", (drop,)))
    if _trigger(connection, runs.relation) is not None:
        drop = _drop_trigger(runs)
        undone.append(Change("drop the truth trigger", (drop,)))
    return undone


def create_index(connection: Connection, runs: RunsTable) -> str:
    """The statements that make the index which serves detection, for a person to read."""
    runs = for_all_targets(connection, runs)
    definition = next(iter(_index_names(runs).values()))
    build = _build(connection, runs.relation, "in_flight", definition)
    return "; ".join(statement.as_string(None) for statement in build)


def truth_trigger_is_there(connection: Connection, runs: RunsTable) -> bool | None:
    """Whether the truth trigger guards the table, as its targets describe it now, and fires.

    Returns:
        None where no target asks for it.

    Raises:
        ConfigurationError: the targets that sweep the table do not go together.
    """
    runs = for_all_targets(connection, runs)
    return _is_there(connection, runs) if is_guarded(runs.target) else None


def _is_there(connection: Connection, runs: RunsTable) -> bool:
    return _trigger(connection, runs.relation) == _Trigger(_truth_argument(runs), fires_last=True)


def drop_truth_trigger(runs: RunsTable) -> str:
    """The statement that takes the truth trigger off the table."""
    return _drop_trigger(runs).as_string(None)


def _drop_trigger(runs: RunsTable) -> sql.Composed:
    return compose("DROP TRIGGER {} ON {}", sql.Identifier(TRUTH_TRIGGER), _table(runs))


def _triggers(connection: Connection, runs: RunsTable) -> list[Change]:
    if not is_guarded(runs.target) or _is_there(connection, runs):
        return []
    _refuse_anothers_trigger(connection, runs)
    terminal = sql.SQL(", ").join(sql.Literal(status) for status in runs.target.ends or ())
    # After, not before: it sees the row as it is stored, whatever other triggers made of it.
    create = compose(
        "CREATE OR REPLACE TRIGGER {} AFTER UPDATE OR DELETE ON {} "
        "FOR EACH ROW WHEN (OLD.{} IN ({})) EXECUTE FUNCTION {}.{}({})",
        sql.Identifier(TRUTH_TRIGGER),
        _table(runs),
        sql.Identifier(runs.facts["status"].name),
        terminal,
        sql.Identifier(SCHEMA),
        sql.Identifier(TRUTH_TRIGGER),
        sql.Literal(_truth_argument(runs)),
    )
    return [Change("the truth trigger: a terminal row never changes again", (create,))]


def _refuse_anothers_trigger(connection: Connection, runs: RunsTable) -> None:
    """A trigger of that name that is not ours would be replaced."""
    statement = text(
        "SELECT tgfoid::regprocedure::text FROM pg_trigger"
        " WHERE tgrelid = :table AND tgname = :name AND tgfoid IS DISTINCT FROM to_regprocedure("
        "format('%I.%I()', CAST(:schema AS text), CAST(:name AS text)))"
    )
    asked = {"table": runs.relation.oid, "name": TRUTH_TRIGGER, "schema": SCHEMA}
    if calls := connection.scalar(statement, asked):
        raise ConfigurationError(
            f"table {runs.name!r} has a trigger {TRUTH_TRIGGER!r} of its own, which calls {calls}: "
            "drop it if it is to do the same, or give it another name, then run this again"
        )


def _truth_argument(runs: RunsTable) -> str:
    """What the trigger's function has to know of this table."""
    frozen = [runs.facts[role].name for role in FROZEN if role in runs.facts]
    told = {
        "key": list(runs.target.columns.id),
        "status": runs.facts["status"].name,
        "frozen": [*runs.target.columns.id, *frozen],
        "terminal": list(runs.target.ends or ()),
    }
    return json.dumps(told, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Trigger:
    argument: str | None
    fires_last: bool
    """After all that may still change the row, and for everybody who does not replicate."""


def _trigger(connection: Connection, relation: Relation) -> _Trigger | None:
    """The trigger on the table that calls the function of the truth trigger, by that name."""
    statement = text(
        "SELECT convert_from(rtrim(tgargs, '\\x00'), getdatabaseencoding())"
        " AS argument, tgenabled IN ('O', 'A') AND tgtype & 2 = 0 AS fires_last"  # 2: BEFORE
        " FROM pg_trigger WHERE tgrelid = :table AND tgname = :name AND tgfoid = to_regprocedure("
        "format('%I.%I()', CAST(:schema AS text), CAST(:name AS text)))"
    )
    asked = {"table": relation.oid, "name": TRUTH_TRIGGER, "schema": SCHEMA}
    found = connection.execute(statement, asked).mappings().one_or_none()
    return None if found is None else _Trigger(**found)


def _index_names(runs: RunsTable) -> dict[str, sql.Composed]:
    """The indexes that a sweep and a summary read by: name and definition."""
    facts, target = runs.facts, runs.target
    key = list(target.columns.id)
    status = sql.Identifier(facts["status"].name)
    first = [facts["created_at"].name] if "created_at" in facts else []
    in_flight = sql.SQL(", ").join(sql.Literal(s) for s in target.in_flight)
    # Only rows in flight are in it, so it stays small however large the table grows; and no
    # column that a heartbeat writes, so that beats stay heap-only updates.
    indexes = {
        _index_name(runs, "in_flight"): compose(
            "({}) WHERE {} IN ({})", names_of(_once(first + key)), status, in_flight
        )
    }
    if target.crash_is_its_own_status and "completed_at" in facts:
        # Without the key: what one statement marked is alike in it, and takes little space. From
        # the oldest on, so that it grows at its end; the newest are read backwards.
        indexes[_index_name(runs, "crashed")] = compose(
            "({} NULLS FIRST) WHERE {} = {}",
            sql.Identifier(facts["completed_at"].name),
            status,
            sql.Literal(target.crashed),
        )
    return indexes


def _indexes(connection: Connection, runs: RunsTable) -> list[Change]:
    if not runs.target.index:
        return []
    served = {"in_flight": "detection", "crashed": "the summary's newest ten"}
    made = []
    for name, definition in _index_names(runs).items():
        end, why = next((end, what) for end, what in served.items() if name.endswith(end))
        build = _build(connection, runs.relation, end, definition)
        made.append(Change(f"an index that serves {why}: {name}", tuple(build), alone=True))
    return made


def _build(
    connection: Connection, relation: Relation, what: str, definition: sql.Composed
) -> list[sql.Composed]:
    """An index, built without keeping anyone from writing; of a partitioned table, part by part.

    Goes on where an earlier migration was cut off; a part that came since has the server's own.
    """
    tree = text(
        "SELECT n.nspname AS schema, c.relname AS name, c.oid, p.isleaf, p.parentrelid::oid AS up"
        " FROM pg_partition_tree(:oid) p JOIN pg_class c ON c.oid = p.relid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind <> 'f'"
        " ORDER BY p.level, c.relname"
    )
    whole = {"schema": relation.schema, "name": relation.name, "oid": relation.oid}
    parts: list[dict[str, Any]] = [{**whole, "isleaf": True, "up": None}]
    if relation.kind == "p":
        parts = [dict(row) for row in connection.execute(tree, {"oid": relation.oid}).mappings()]
    build: list[sql.Composed] = []
    attach: list[sql.Composed] = []
    index: dict[int, _Index] = {}  # by the table's oid
    name = _fitted(relation.name, f"_{what}")
    note = f"orphan-recovery {hashlib.sha256(definition.as_string(None).encode()).hexdigest()[:16]}"
    whole_index = _index_of(connection, relation.oid, name, None)
    follows = whole_index is None or whole_index.note in (None, note)  # none: made by hand
    stays = follows and whole_index is not None and (whole_index.is_valid or relation.kind == "p")
    if not follows:
        how = "" if relation.kind == "p" else "CONCURRENTLY "
        build.append(compose(f"DROP INDEX {how}{{}}", _qualified(relation.schema, name)))
    for part in parts:
        up = None if part["oid"] == relation.oid else index[part["up"]]
        own = _fitted(part["name"], f"_{what}")
        there = _index_of(connection, part["oid"], own, None if up is None else up.oid)
        if there is None:
            _refuse_anothers_name(connection, relation, part["schema"], own)
        if not follows:
            there = None
        if there is not None and there.is_attached:
            index[part["oid"]] = there
            continue
        if there is not None and not there.is_valid and part["isleaf"]:  # an interrupted build
            build.append(compose("DROP INDEX CONCURRENTLY {}", _qualified(part["schema"], own)))
            there = None
        if there is None:
            how = "CONCURRENTLY {} ON {} {}" if part["isleaf"] else "{} ON ONLY {} {}"
            table = sql.Identifier(part["schema"], part["name"])
            build.append(compose(f"CREATE INDEX {how}", sql.Identifier(own), table, definition))
        if up is None and (not stays or (there and not there.is_valid and there.note is None)):
            build.append(
                compose("COMMENT ON INDEX {} IS {}", _qualified(part["schema"], own), note)
            )
        if up is not None:
            attach.append(
                compose(
                    "ALTER INDEX {} ATTACH PARTITION {}",
                    _qualified(up.schema, up.name),
                    _qualified(part["schema"], own),
                )
            )
        index[part["oid"]] = there or _Index(None, part["schema"], own, False, False, None)
    return build + attach[::-1]


def _refuse_anothers_name(
    connection: Connection, relation: Relation, schema: str, name: str
) -> None:
    """What has the index's name and is none of the table's would fail the build, half way."""
    if found := look_up(connection, schema, name):
        raise ConfigurationError(
            f"table {relation.name!r} needs an index {name!r}, but schema {schema!r} has "
            f"another {found.what} of that name: rename it, or build an index yourself and set "
            "index = false for the target; then run this again"
        )


@dataclass(frozen=True, slots=True)
class _Index:
    oid: int | None
    schema: str
    name: str
    is_valid: bool
    is_attached: bool
    note: str | None
    """What it was made for."""


def _index_of(connection: Connection, table: int, name: str, up: int | None) -> _Index | None:
    """The index of ``table`` that is a part of the index ``up``, else that of our name."""
    statement = text(
        "SELECT c.oid, n.nspname AS schema, c.relname AS name, i.indisvalid AS is_valid,"
        " h.inhparent IS NOT NULL AS is_attached, obj_description(c.oid, 'pg_class') AS note"
        " FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_inherits h ON h.inhrelid = c.oid AND h.inhparent = CAST(:up AS oid)"
        " WHERE i.indrelid = :table AND (c.relname = :name OR h.inhparent IS NOT NULL)"
        " ORDER BY is_attached DESC LIMIT 1"
    )
    asked = {"table": table, "name": name, "up": up}
    found = connection.execute(statement, asked).mappings().one_or_none()
    return None if found is None else _Index(**found)


def _index_name(runs: RunsTable, what: str) -> str:
    return _fitted(runs.relation.name, f"_{what}")


def _fitted(name: str, ending: str) -> str:
    """``name`` and ``ending`` within the 63 bytes that an identifier may have, and unmistakable."""
    if len(f"{name}{ending}".encode()) <= 63:
        return name + ending
    ending = f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}{ending}"
    room = 63 - len(ending.encode())
    return name.encode()[:room].decode(errors="ignore") + ending


def _once(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _table(runs: RunsTable) -> sql.Identifier:
    return sql.Identifier(runs.relation.schema, runs.relation.name)


def _qualified(schema: str, name: str) -> sql.Identifier:
    return sql.Identifier(schema, name)


def names_of(names: list[str]) -> sql.Composed:
    """Names as they stand in a statement, quoted."""
    return sql.SQL(", ").join(map(sql.Identifier, names))


def compose(template: LiteralString, *parts: Any) -> sql.Composed:
    """A statement of constant text and quoted parts."""
    return sql.SQL(template).format(*parts)
