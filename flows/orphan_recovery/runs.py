"""The runs: a target's table as it stands in the database, and the expressions that read it.

The hazard is a timestamp read in the wrong zone, or a column taken for another. So a target's
description is held against the database's own catalogue, once for each engine, and what does not
fit is refused before anything is read; and every time that leaves here is an aware UTC time
whatever the column's type and the session's TimeZone.

There is one set of statements for every table; the default table is just the default description.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnClause,
    ColumnElement,
    Connection,
    Engine,
    FromClause,
    MetaData,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    column,
    false,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    table,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import quoted_name
from sqlalchemy.sql.selectable import LateralFromClause
from sqlalchemy.types import TypeEngine

from orphan_recovery.catalog import ColumnFacts, Relation, accepts, look_up, similar
from orphan_recovery.database import Executor
from orphan_recovery.run import Evidence
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.targets import Columns, Target, split_table, where

TIMES: Final = ("created_at", "started_at", "heartbeat_at")
"""The run's own signs of life, by role."""
ROLES: Final = tuple(role for role in Columns.model_fields if role != "id")

_AWARE = TIMESTAMP(timezone=True)
_AWARE_OR_NULL: TypeEngine[datetime | None] = _AWARE  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Kept:
    """Signs of life that another table keeps."""

    table: Table
    """With the columns ``key`` and ``last_seen``."""
    our_key: ColumnElement[Any]
    their_key: ColumnElement[Any]
    """Equal where a row there is about a run here."""
    last_seen: ColumnFacts
    latest: LateralFromClause
    """The latest one of each run, as ``seen_at``."""


@dataclass(frozen=True, eq=False)
class RunsTable:
    """A target's table with its real column types, and the expressions that read it.

    Columns go by their role (``status``, ``worker_id``, …) whatever they are called there.
    """

    target: Target
    relation: Relation
    table: Table
    facts: dict[str, ColumnFacts]
    elsewhere: "dict[str, Kept]"
    """Signs of life in other tables, by ``worker_heartbeat`` or ``run_events``."""
    released: tuple[Column[Any], ...]
    """Columns that the mark sets to NULL."""

    @property
    def columns(self) -> Any:
        return self.table.c

    @property
    def name(self) -> str:
        return self.target.table

    def has(self, role: str) -> bool:
        return role in self.facts

    @cached_property
    def key(self) -> list[Column[Any]]:
        """The columns of the key, in the order they were given in."""
        by_name = {column.name: column for column in self.table.c}
        return [by_name[name] for name in self.target.columns.id]

    @cached_property
    def run_id(self) -> ColumnElement[str]:
        """The key as one text; of several columns, a JSON array of their texts."""
        texts = [self.text(str(column.key)) for column in self.key]
        return texts[0] if len(texts) == 1 else cast(func.jsonb_build_array(*texts), Text)

    def key_of(self, run_id: ColumnElement[str]) -> list[ColumnElement[Any]]:
        """The way back: the columns' values from the one text."""
        if len(self.key) == 1:
            texts = [run_id]
        else:
            array = cast(run_id, JSONB)
            texts = [array.op("->>", return_type=Text())(n) for n, _ in enumerate(self.key)]
        return [cast(text, column.type) for text, column in zip(texts, self.key, strict=True)]

    def is_row(self, run_id: ColumnElement[str]) -> ColumnElement[bool]:
        """Whether a row is the one with that key; an index can serve it."""
        return and_(*(a == b for a, b in zip(self.key, self.key_of(run_id), strict=True)))

    def reads_from(self, seen: FromClause | None = None, *, outer: bool = False) -> FromClause:
        """The table, and what the signs of life need beside it.

        Args:
            seen: snapshots to join by their ``run_id``.
            outer: keep the snapshots whose row is gone.
        """
        source: FromClause = self.table
        if seen is not None and outer:
            source = seen.join(self.table, self.is_row(seen.c.run_id), isouter=True)
        elif seen is not None:
            source = self.table.join(seen, self.is_row(seen.c.run_id))
        for kept in self.elsewhere.values():  # a run whose worker's row is gone keeps the rest
            source = source.join(kept.latest, true(), isouter=True)
        return source

    def text(self, role: str) -> ColumnElement[str]:
        """A column as text, so that uuid, enum and text compare alike; NULL where there is none."""
        if role not in self.facts:
            return cast(null(), Text)
        if (
            self.facts[role].category == "D"
        ):  # a time's text depends on DateStyle, its JSON does not
            stored: ColumnElement[Any] = self.table.c[role]
            if self.facts[role].kind != "timestamptz":
                return _json_text(func.to_jsonb(stored))
            # In UTC, so that a run has one id whatever the session's TimeZone.
            utc = _json_text(func.to_jsonb(func.timezone("UTC", stored)))
            return utc + case((func.isfinite(stored), "+00:00"), else_="")
        return cast(self.table.c[role], Text)

    @property
    def error_text(self) -> ColumnElement[str]:
        """What the error column says; a JSON text without its quotes."""
        if self.has("error") and self.facts["error"].kind in ("json", "jsonb"):
            return _json_text(self.table.c.error)
        return self.text("error")

    def plain(self, role: str) -> ColumnElement[Any]:
        """A column as it is; NULL where there is none."""
        return self.table.c[role] if role in self.facts else null()

    def utc(self, role: str) -> ColumnElement[datetime | None]:
        """A time as an instant; a naive one is read as UTC, never as TimeZone."""
        if role not in self.facts:
            return cast(null(), _AWARE_OR_NULL)
        return _utc(self.table.c[role], self.facts[role])

    def stored(self, role: str, instant: ColumnElement[datetime]) -> ColumnElement[datetime]:
        """An instant as the column stores it: itself, or naive UTC."""
        return stored(instant, self.facts[role])

    def written(self, role: str, value: Any) -> ColumnElement[Any]:
        """A text, or a value that is ready for JSON, as the column stores it; cut to its length."""
        facts = self.facts[role]
        if not facts.is_text:
            told = value if isinstance(value, ColumnElement) else literal(json.dumps(value), Text)
            as_json = func.to_jsonb(told) if told is value else told
            return cast(as_json, facts.type)
        if not isinstance(value, ColumnElement):
            value = literal(value if isinstance(value, str) else json.dumps(value), Text)
        return cast(value if facts.length is None else func.left(value, facts.length), facts.type)

    @cached_property
    def in_flight(self) -> ColumnElement[bool]:
        """Values of the column's own type: only so does the partial index serve them."""
        return self.table.c.status.in_(
            [literal(s, self.facts["status"].type) for s in self.target.in_flight]
        )

    @cached_property
    def is_crashed(self) -> ColumnElement[bool]:
        return self.table.c.status == literal(self.target.crashed, self.facts["status"].type)

    @cached_property
    def worker_seen_at(self) -> ColumnElement[datetime | None]:
        if "worker_heartbeat" not in self.elsewhere:
            return cast(null(), _AWARE_OR_NULL)
        return self.elsewhere["worker_heartbeat"].latest.c.seen_at

    @cached_property
    def sign_of_life(self) -> ColumnElement[datetime]:
        """The latest time that shows the run was alive; NULL if there is none."""
        times = [self.utc(role) for role in TIMES if self.has(role)]
        times += [kept.latest.c.seen_at for kept in self.elsewhere.values()]
        return func.greatest(*times, type_=_AWARE)

    @cached_property
    def lock_key(self) -> ColumnElement[int]:
        """The advisory lock that a run's worker holds for as long as it lives."""
        whose = self.text("worker_id") if self.target.lock == "worker" else self.run_id
        return lock_key(self.relation, whose)

    @cached_property
    def is_held(self) -> ColumnElement[bool]:
        """Whether a worker holds the run, by its row: nobody keeps a lock for one that waits."""
        return self.table.c.worker_id.is_not(None) if self.has("worker_id") else true()

    @cached_property
    def is_locked(self) -> ColumnElement[bool]:
        """Whether a worker holds a run's lock; never, where none is kept. One look for all."""
        if self.target.lock is None:
            return false()
        columns: list[ColumnClause[Any]] = [column(name) for name in _LOCK_COLUMNS]
        locks = table("pg_locks", *columns, schema="pg_catalog")
        database: Select[Any] = (
            select(literal_column("oid"))
            .select_from(table("pg_database"))
            .where(literal_column("datname") == func.current_database())
        )
        held = select(
            cast(locks.c.classid, BigInteger)
            .op("<<")(literal_column("32"))
            .op("|")(cast(locks.c.objid, BigInteger))
        ).where(
            locks.c.locktype == "advisory",
            locks.c.objsubid == 1,  # one key of 64 bits
            locks.c.mode == "ExclusiveLock",  # a mark shares it, and is no sign of life
            locks.c.granted,
            locks.c.database == database.scalar_subquery(),
        )
        return func.coalesce(self.lock_key.in_(held), false())

    @cached_property
    def evidence(self) -> ColumnElement[str]:
        sources = (
            (Evidence.RUN_HEARTBEAT, self.utc("heartbeat_at"), self.has("heartbeat_at")),
            (Evidence.WORKER_HEARTBEAT, self.worker_seen_at, "worker_heartbeat" in self.elsewhere),
        )
        whens = [
            (time == self.sign_of_life, literal(evidence.value))
            for evidence, time, is_there in sources
            if is_there
        ]
        if self.target.lock is not None:
            whens.insert(0, (self.is_held, literal(Evidence.LOCK.value)))
        age = literal(Evidence.AGE.value)
        return case(*whens, else_=age) if whens else age

    def silent_since(
        self, cutoff: ColumnElement[datetime], latest: ColumnElement[datetime]
    ) -> ColumnElement[bool]:
        """Whether the last sign of life is no later than ``cutoff``.

        Args:
            cutoff: of this run, by its own threshold.
            latest: no earlier than the cutoff of any run. The clause with it follows from the
                other, whose time can be no earlier than created_at: an index can serve it.
        """
        silent = self.sign_of_life <= cutoff
        if not self.has("created_at"):
            return silent
        created = self.table.c.created_at
        bound = created <= self.stored("created_at", latest)
        if self.facts["created_at"].is_nullable:
            bound = or_(created.is_(None), bound)
        return and_(bound, silent)

    def matches(self, role: str, pattern: str) -> ColumnElement[bool]:
        """Whether a column's text fits: ``*`` is any text, ``?`` any one character."""
        if role not in self.facts:
            return false()
        if not any(wild in pattern for wild in "*?"):
            return self.text(role) == pattern
        like = pattern
        for special in "\\%_":
            like = like.replace(special, f"\\{special}")
        return self.text(role).like(like.replace("*", "%").replace("?", "_"), escape="\\")


def _json_text(value: ColumnElement[Any]) -> ColumnElement[str]:
    whole: ColumnElement[Any] = literal_column("'{}'::text[]")
    return value.op("#>>", return_type=Text())(whole)


def _key_role(number: int) -> str:
    return f"id_{number + 1}"


_LOCK_COLUMNS: Final = (
    *("locktype", "database", "classid", "objid", "objsubid", "mode", "granted"),
)


def lock_key(relation: Relation, whose: ColumnElement[str]) -> ColumnElement[int]:
    """The key of a run's or a worker's advisory lock, 64 bits of its name's hash.

    Two names of one key would keep each other alive: among a million held at once that is one
    chance in 37 million. The table goes by its name in the catalogue: a worker and a sweep may
    each describe it in their own way.
    """
    name = func.concat(f"orphan_recovery {relation.schema}.{relation.name} ", whose)
    return func.hashtextextended(name, 0, type_=BigInteger())


def stored(instant: ColumnElement[datetime], facts: ColumnFacts) -> ColumnElement[datetime]:
    """An instant as a column stores it: itself, or naive UTC."""
    return instant if facts.kind == "timestamptz" else func.timezone("UTC", instant)


def _utc(stored: ColumnElement[Any], facts: ColumnFacts) -> ColumnElement[datetime | None]:
    """Times before the year 1, ``-infinity`` among them, say nothing: Python cannot hold them."""
    instant = stored if facts.kind == "timestamptz" else func.timezone("UTC", stored)
    return case((instant >= literal_column("timestamptz '0001-01-02 00:00+00'"), instant))


_known: WeakKeyDictionary[Engine, dict[Target, RunsTable]] = WeakKeyDictionary()


async def runs_table(db: Executor, target: Target) -> RunsTable:
    """The target's table as the database has it. Reads the catalogue once for each engine.

    Raises:
        ConfigurationError: the table, or a column, is not there or not fit for its role. Says
            which, where that was configured, and what to do.
    """
    connection = db if isinstance(db, AsyncConnection) else await db.connection()
    known = _known.setdefault(connection.engine.sync_engine, {})
    if target not in known:
        known[target] = await connection.run_sync(describe_runs, target)
    return known[target]


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
    names = {_key_role(n): name for n, name in enumerate(target.columns.id)}
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
    elsewhere = {
        key: _elsewhere(connection, target, relation, table, key)
        for key in ("worker_heartbeat", "run_events")
        if getattr(target, key) is not None
    }
    for name in target.release:
        if name in relation.columns and not relation.columns[name].is_nullable:
            raise ConfigurationError(
                f"{where(target, 'release')} has {name!r}, which is NOT NULL in {target.table!r}: "
                "the mark sets it to NULL; leave it out"
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
    if not alike:
        our_key, their_key = cast(our_key, Text), cast(their_key, Text)
    # By a name of ours: theirs may be that of the runs, in another schema.
    rows = times.alias("orphan_recovery_kept")
    whose: ColumnElement[Any] = rows.c.key if alike else cast(rows.c.key, Text)
    latest = func.max(_utc(rows.c.last_seen, last_seen), type_=_AWARE).label("seen_at")
    heard = select(latest).where(whose == our_key).correlate(table)
    of_run = heard.lateral(f"orphan_recovery_{key}")
    return Kept(times, our_key, their_key, last_seen, of_run)


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
