"""Describe: a target's description, held against the database's own catalogue.

The hazard is a column taken for another, or a key that is not one. So what does not fit is
refused before anything is read, with the place where it was configured and the way out. The
catalogue is read once for each sweep; and where an engine lives on, again once it has changed.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    MetaData,
    Table,
    Text,
    cast,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import quoted_name

from orphan_recovery.catalog import (
    CatalogType,
    ColumnFacts,
    Relation,
    accepts,
    look_up,
    similar,
    stamp_of,
)
from orphan_recovery.database import Executor
from orphan_recovery.runs import PLACE, ROLES, TIMES, Kept, RunsTable, as_utc, key_role
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target, split_table
from orphan_recovery.targets import no_file_told, where

_AWARE = TIMESTAMP(timezone=True)

_READABLE = {"DateStyle": "ISO", "IntervalStyle": "postgres"}

_known: WeakKeyDictionary[Engine, dict[Target, RunsTable]] = WeakKeyDictionary()


async def runs_table(db: Executor, target: Target, *, anew: bool = False) -> RunsTable:
    """The target's table as the database has it. Reads the catalogue once for each engine.

    Args:
        db: where it is.
        target: its description.
        anew: ask whether it still is as it was, since the engine may live for long; always so for
            a caller's session, whose search_path may have changed as well.

    Raises:
        ConfigurationError: the table, or a column, is not there or not fit for its role. Says
            which, where that was configured, and what to do. Or the session is none that can be
            used here.
    """
    if isinstance(db, AsyncConnection):
        connection = db
    else:
        connection, anew = await db.connection(), True
        await _check_session(connection)
    known = _known.setdefault(connection.engine.sync_engine, {})
    found = known.get(target)
    if found is None or (anew and await connection.run_sync(_has_changed, found)):
        found = known[target] = await connection.run_sync(describe_runs, target)
    return found


def _has_changed(connection: Connection, runs: RunsTable) -> bool:
    """Whether the table, or one that keeps its signs of life, is not as it was, or is another."""
    tables = [(runs.target.table, runs.relation)]
    tables += [(getattr(runs.target, k).table, kept.relation) for k, kept in runs.elsewhere.items()]
    return any(
        stamp_of(connection, *split_table(name)) != relation.stamp for name, relation in tables
    )


async def _check_session(connection: AsyncConnection) -> None:
    if connection.dialect.driver != "psycopg":
        raise ConfigurationError(
            f"this session is on the driver {connection.dialect.driver!r}: give one of an engine "
            "on psycopg, such as create_async_engine('postgresql+psycopg://…')"
        )
    within = connection.sync_connection
    if within is not None and within.get_execution_options().get("schema_translate_map"):
        raise ConfigurationError(
            "this session has a schema_translate_map, by which statements would read another "
            "table than was looked up: give one without; a target's table may name its schema"
        )
    raw = (await connection.get_raw_connection()).driver_connection
    for setting, readable in _READABLE.items():
        has = None if raw is None else raw.info.parameter_status(setting)
        if has and has.partition(",")[0] != readable:
            raise ConfigurationError(
                f"this session has {setting} {has!r}, which the driver cannot read times by: "
                f"SET {setting} = {readable} in it"
            )


def describe_runs(
    connection: Connection, target: Target, relation: Relation | None = None
) -> RunsTable:
    """Hold the target's description against the catalogue. Reads only.

    Args:
        connection: to the database that holds the table.
        target: the description.
        relation: the table as it will be, where it is not there yet.

    Raises:
        ConfigurationError: as :func:`runs_table`.
    """
    relation = relation or find_relation(connection, target)
    names = {key_role(n): name for n, name in enumerate(target.columns.id)}
    for role in ROLES:
        given = getattr(target.columns, role)
        name = role if given is None else given
        if name and (given is not None or name in relation.columns):
            names[role] = name
    missing = {role: name for role, name in names.items() if name not in relation.columns}
    if target.is_default_table:
        missing |= {role: role for role in ROLES if role not in names}
    if missing:
        raise _missing_columns(target, relation, missing)
    facts = {role: relation.columns[name] for role, name in names.items()}
    _check_roles(connection, target, relation, facts)
    schema, _ = split_table(target.table)
    table = _table(relation, schema, {role: fact.name for role, fact in facts.items()})
    if relation.shows_places:
        table.append_column(Column("ctid", CatalogType("pg_catalog.tid"), key=PLACE, system=True))
    elsewhere = {
        key: _elsewhere(connection, target, relation, table, key)
        for key in ("worker_heartbeat", "run_events")
        if getattr(target, key) is not None
    }
    for name in target.release:
        if name in relation.columns and relation.columns[name].refuses_null:
            raise ConfigurationError(
                f"{where(target, 'release')} has {name!r}, which is NOT NULL in {target.table!r}: "
                "the mark sets it to NULL; leave it out"
            )
        if name in relation.columns and relation.columns[name].is_generated:
            raise ConfigurationError(
                f"{where(target, 'release')} has {name!r}, which is generated in {target.table!r}, "
                "and cannot be set to NULL: leave it out"
            )
    released = tuple(_any_column(target, relation, table, name) for name in target.release)
    if not any(role in facts for role in TIMES) and not elsewhere:
        raise ConfigurationError(
            f"{where(target)} has no source of signs of life: name a column as created_at, "
            "started_at or heartbeat_at under columns, or a worker_heartbeat, or run_events"
        )
    if target.lock == "worker" and "worker_id" not in facts:
        raise ConfigurationError(
            f"{where(target, 'lock')} is 'worker', but there is no column for worker_id: name it "
            'under columns, or let each run have a lock, with lock = "run"'
        )
    for number, rule in enumerate(target.rules):
        if unknown := [role for role in rule.match if role not in facts]:
            raise ConfigurationError(
                f"{where(target, 'rules', str(number), 'match')} looks at {unknown[0]!r}, for "
                f"which table {target.table!r} has no column: name it under columns, or leave "
                "the rule out"
            )
    return RunsTable(target, relation, table, facts, elsewhere, released)


def find_relation(connection: Connection, target: Target, *keys: str) -> Relation:
    """The target's table, or another that it names under ``keys``, in the catalogue. Reads only.

    Raises:
        ConfigurationError: there is no such table, or it is a view or the like.
    """
    own = not keys
    name: str = target.table if own else getattr(target, keys[0]).table
    key = (*keys, "table")
    relation = look_up(connection, *split_table(name))
    if relation is None:
        if target.is_default_table and own:
            raise ConfigurationError(
                f"table {name!r} is not in database {connection.engine.url.database!r} (or not on "
                "its search_path): run `orphan-recovery migrate`, which creates it or adopts the "
                "one you have, or describe the table you have in orphan-recovery.toml"
                + no_file_told()
            )
        close = similar(connection, split_table(name)[1])
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigurationError(
            f"{where(target, *key)} is {name!r}, which is not in database "
            f"{connection.engine.url.database!r} (or not on its search_path): {hint}give it as "
            "schema.table, each name as the catalogue has it"
        )
    if own and not relation.is_table:
        raise ConfigurationError(
            f"{where(target, *key)} is {name!r}, which is a {relation.what}: a row of it cannot "
            "be locked and marked; name the table that it is made from"
        )
    return relation


def _table(relation: Relation, schema: str | None, names: dict[str, str]) -> Table:
    """A table whose columns go by their role. Without a schema it follows the search path.

    A part of the key that has a role besides goes by that role.
    """
    shared = {name for role, name in names.items() if role[:3] != "id_"}
    columns = [
        Column(quoted_name(name, quote=True), relation.columns[name].type, key=role)
        for role, name in names.items()
        if role[:3] != "id_" or name not in shared
    ]
    quoted_schema = None if schema is None else quoted_name(relation.schema, quote=True)
    name = quoted_name(relation.name, quote=True)
    return Table(name, MetaData(), *columns, schema=quoted_schema)


def _elsewhere(
    connection: Connection, target: Target, relation: Relation, table: Table, key: str
) -> Kept:
    asked = getattr(target, key)
    kept = find_relation(connection, target, key)
    for part, name in (("key", asked.key), ("last_seen", asked.last_seen)):
        if name not in kept.columns:
            raise _no_column(target, (key, part), name, kept)
    last_seen, theirs = kept.columns[asked.last_seen], kept.columns[asked.key]
    if not last_seen.is_time:
        raise _no_time(target, (key, "last_seen"), last_seen, kept.name)
    schema, _ = split_table(asked.table)
    times = _table(kept, schema, {"key": asked.key, "last_seen": asked.last_seen})
    their_key: ColumnElement[Any] = times.c.key
    our_key: ColumnElement[Any] = _any_column(
        target, relation, table, asked.run_key, key, "run_key"
    )
    ours = relation.columns[asked.run_key]
    alike = ours.kind == theirs.kind or {ours.category, theirs.category} in ({"N"}, {"S"})
    # By a name of ours: theirs may be that of the runs, in another schema.
    rows = times.alias("orphan_recovery_kept")
    whose: ColumnElement[Any] = rows.c.key
    if not alike:
        is_uuid = "uuid" in (ours.kind, theirs.kind)
        our_key, their_key, whose = (_as_text(k, is_uuid) for k in (our_key, their_key, whose))
    latest = func.max(as_utc(rows.c.last_seen, last_seen), type_=_AWARE).label("seen_at")
    heard = select(latest).where(whose == our_key).correlate(table)
    of_run = heard.lateral(f"orphan_recovery_{key}")
    unlike = None if alike else (ours.declared, theirs.declared)
    return Kept(kept, times, our_key, their_key, last_seen, of_run, unlike)


def _as_text(key: ColumnElement[Any], is_uuid: bool) -> ColumnElement[str]:
    """A key that is compared with one of another type. A text may have a uuid in capitals."""
    return func.lower(cast(key, Text)) if is_uuid else cast(key, Text)


def _any_column(
    target: Target, relation: Relation, table: Table, name: str, *keys: str
) -> Column[Any]:
    """A column of the runs table by its name, whether or not it has a role."""
    if name not in relation.columns:
        raise _no_column(target, keys or ("release",), name, relation)
    found = next((column for column in table.c if column.name == name), None)
    if found is None:
        kind = relation.columns[name].type
        found = Column(quoted_name(name, quote=True), kind, key=f"column {name}")
        table.append_column(found)
    return found


def _no_column(
    target: Target, keys: tuple[str, ...], name: str, relation: Relation
) -> ConfigurationError:
    return ConfigurationError(
        f"{where(target, *keys)} is {name!r}, but {relation.what} {relation.name!r} has no such "
        f"column: it has {', '.join(relation.columns)}"
    )


def _missing_columns(
    target: Target, relation: Relation, missing: dict[str, str]
) -> ConfigurationError:
    if target.is_default_table:
        return ConfigurationError(
            f"table {target.table!r} has no column {', '.join(map(repr, missing.values()))}: run "
            "`orphan-recovery migrate`, which adds missing columns and rewrites nothing, or "
            "describe the table you have in orphan-recovery.toml"
        )
    told = []
    for role, name in missing.items():
        key = "id" if role.startswith("id_") else role
        told.append(f"{where(target, 'columns', key)} is {name!r}")
    return ConfigurationError(
        f"{', '.join(told)}, but {relation.what} {target.table!r} has no such column: it has "
        f"{', '.join(relation.columns)}"
    )


def _check_roles(
    connection: Connection, target: Target, relation: Relation, facts: dict[str, ColumnFacts]
) -> None:
    keys = set(target.columns.id)
    # In parts by status a key has to have the status in it; the mark pins that itself.
    pinned = {facts["status"].name} if relation.kind == "p" else set()
    if not any(unique - pinned and unique - pinned <= keys for unique in relation.unique):
        have = " or ".join(str(sorted(unique)) for unique in relation.unique) or "none"
        raise ConfigurationError(
            f"{where(target, 'columns', 'id')} is {sorted(keys)}, which no unique index of "
            f"{target.table!r} covers: one mark could hit several rows (a key that may be NULL is "
            f"not unique). Unique together: {have}"
        )
    for role in (*TIMES, "completed_at"):
        if role in facts and not facts[role].is_time:
            raise _no_time(target, ("columns", role), facts[role], target.table)
    fit: tuple[tuple[str, bool, str], ...] = (
        ("success", _is(facts, "success", ("bool",)), "boolean"),
        ("is_retry", _is(facts, "is_retry", ("bool",)), "boolean"),
        (
            "output_json",
            _is(facts, "output_json", ("json", "jsonb")) or facts["output_json"].is_text,
            "text, json or jsonb",
        ),
        ("attempt", "attempt" not in facts or facts["attempt"].category == "N", "a number"),
        (
            "error",
            _is(facts, "error", ("json", "jsonb")) or facts["error"].is_text,
            "text, json or jsonb",
        ),
    )
    for role, fits, wanted in fit:
        if not fits:
            raise ConfigurationError(
                f"{where(target, 'columns', role)}: column {facts[role].name!r} of "
                f"{target.table!r} is {facts[role].declared}, where {wanted} is needed; name "
                f"another column, or {role} = false to leave it alone"
            )
    for role in ("status", "error", "completed_at", "success"):
        if role in facts and facts[role].is_generated:
            raise ConfigurationError(
                f"{where(target, 'columns', role)}: column {facts[role].name!r} of "
                f"{target.table!r} is generated, and cannot be written; name another, or "
                f"{role} = false to leave it alone"
            )
    status = facts["status"]
    for key, values in (
        ("in_flight", target.in_flight),
        ("crashed", (target.crashed,)),
        ("terminal", target.terminal or ()),
        ("waiting", target.waiting),
    ):
        for value in values:
            # What is only read need not be allowed by the table, but by its type all the same.
            written = key == "crashed"
            if refusal := accepts(connection, relation, status.name, value, written=written):
                raise ConfigurationError(
                    f"{where(target, key)} has {value!r}, which column {status.name!r} of "
                    f"{target.table!r} cannot hold: {refusal}"
                )


def _is(facts: dict[str, ColumnFacts], role: str, kinds: Sequence[str]) -> bool:
    return role not in facts or facts[role].kind in kinds


def _no_time(
    target: Target, key: tuple[str, ...], facts: ColumnFacts, table: str
) -> ConfigurationError:
    out = f", or {key[-1]} = false if there is none" if key[0] == "columns" else ""
    return ConfigurationError(
        f"{where(target, *key)}: column {facts.name!r} of table {table!r} is {facts.declared}: "
        f"a time must be timestamptz, or timestamp in UTC; name another column{out}"
    )
