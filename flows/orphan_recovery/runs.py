"""The runs: a target's table, and the expressions that read it.

The hazard is a timestamp read in the wrong zone: so every time that leaves here is an aware UTC
time whatever the column's type and the session's TimeZone. See :mod:`orphan_recovery.describe`
for how a table comes to be one of these.

There is one set of statements for every table; the default table is just the default description.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnClause,
    ColumnElement,
    FromClause,
    Table,
    Text,
    and_,
    case,
    cast,
    collate,
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
from sqlalchemy.sql.selectable import LateralFromClause
from sqlalchemy.types import TypeEngine

from orphan_recovery.catalog import ColumnFacts, Relation
from orphan_recovery.database import this_database
from orphan_recovery.run import Evidence
from orphan_recovery.target import Columns, Target

TIMES: Final = ("created_at", "started_at", "heartbeat_at")
"""The run's own signs of life, by role."""
PLACE: Final = "place"
"""Among a table's columns, where a row lies; only where that tells it from all others."""
ROLES: Final = tuple(role for role in Columns.model_fields if role != "id")

_AWARE = TIMESTAMP(timezone=True)
_AWARE_OR_NULL: TypeEngine[datetime | None] = _AWARE  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Kept:
    """Signs of life that another table keeps."""

    relation: Relation
    table: Table
    """With the columns ``key`` and ``last_seen``."""
    our_key: ColumnElement[Any]
    their_key: ColumnElement[Any]
    """Equal where a row there is about a run here."""
    last_seen: ColumnFacts
    latest: LateralFromClause
    """The latest one of each run, as ``seen_at``."""
    unlike: tuple[str, str] | None
    """The types of the two keys, where they differ and are compared as texts; else None."""


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

    def is_same(self, role: str, given: ColumnElement[Any]) -> ColumnElement[bool]:
        """Whether a column holds what somebody gave as text."""
        return self.text(role) == self.as_written(role, given)

    def as_written(self, role: str, given: ColumnElement[Any]) -> ColumnElement[str]:
        """A text as the column would write it: of a uuid it may have been in capitals, of a number
        with zeros before it."""
        facts = self.facts[role]
        return given if facts.is_text else cast(cast(given, facts.type), Text)

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
        return as_utc(self.table.c[role], self.facts[role])

    def shown(self, role: str) -> ColumnElement[datetime | None]:
        """A time for people; NULL where Python cannot hold it, ``infinity`` among them."""
        instant = self.utc(role)
        return case((instant < literal_column("timestamptz '9999-12-31 00:00+00'"), instant))

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
        """Values of the column's own type: only so does the partial index serve them; and what
        equals them there may be another text (``1.0``, or another case)."""
        return self.has_status(*self.target.in_flight)

    @cached_property
    def is_waiting(self) -> ColumnElement[bool]:
        return self.has_status(*self.target.waiting)

    @cached_property
    def is_crashed(self) -> ColumnElement[bool]:
        return self.has_status(self.target.crashed)

    def has_status(self, *words: str) -> ColumnElement[bool]:
        """Whether the status is one of these, as its column compares."""
        kind = self.facts["status"].type
        return self.table.c.status.in_([literal(word, kind) for word in words])

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
        held = select(
            cast(locks.c.classid, BigInteger)
            .op("<<")(literal_column("32"))
            .op("|")(cast(locks.c.objid, BigInteger))
        ).where(
            locks.c.locktype == "advisory",
            locks.c.objsubid == 1,  # one key of 64 bits
            locks.c.mode == "ExclusiveLock",  # a mark shares it, and is no sign of life
            locks.c.granted,
            locks.c.database == this_database(),
        )
        return func.coalesce(self.lock_key.in_(held), false())

    @cached_property
    def beats(self) -> dict[Evidence, ColumnElement[datetime | None]]:
        """The signs of life that somebody has to go on giving."""
        sources = (
            (Evidence.RUN_HEARTBEAT, self.utc("heartbeat_at"), self.has("heartbeat_at")),
            (Evidence.WORKER_HEARTBEAT, self.worker_seen_at, "worker_heartbeat" in self.elsewhere),
        )
        return {evidence: time for evidence, time, is_there in sources if is_there}

    @cached_property
    def evidence(self) -> ColumnElement[str]:
        whens = [
            (time == self.sign_of_life, literal(evidence.value))
            for evidence, time in self.beats.items()
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

    def matches(
        self, role: str, pattern: str, was: ColumnElement[str] | None = None
    ) -> ColumnElement[bool]:
        """Whether a column's text fits: ``*`` is any text, ``?`` any one character.

        Args:
            role: of the column.
            pattern: as it was given; its case counts where the column's does.
            was: what the column had, as text, where that is not read from the row as it stands.
        """
        if role not in self.facts:
            return false()
        text = self.text(role) if was is None else was
        fold = func.lower if self.facts[role].kind in ("uuid", "citext") else _as_it_is
        if not any(wild in pattern for wild in "*?"):
            return fold(text) == fold(literal(pattern))
        like = pattern
        for special in "\\%_":
            like = like.replace(special, f"\\{special}")
        like = like.replace("*", "%").replace("?", "_")
        return fold(text).like(fold(literal(like)), escape="\\")


def _as_it_is(value: Any) -> Any:
    return value


def _json_text(value: ColumnElement[Any]) -> ColumnElement[str]:
    whole: ColumnElement[Any] = literal_column("'{}'::text[]")
    return value.op("#>>", return_type=Text())(whole)


def key_role(number: int) -> str:
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
    # By its bytes: a column's collation may have another hash for the same text.
    return func.hashtextextended(collate(name, "C"), 0, type_=BigInteger())


def stored(instant: ColumnElement[datetime], facts: ColumnFacts) -> ColumnElement[datetime]:
    """An instant as a column stores it: itself, or naive UTC."""
    return instant if facts.kind == "timestamptz" else func.timezone("UTC", instant)


def as_utc(stored: ColumnElement[Any], facts: ColumnFacts) -> ColumnElement[datetime | None]:
    """Times before the year 1, ``-infinity`` among them, say nothing: Python cannot hold them."""
    instant = stored if facts.kind == "timestamptz" else func.timezone("UTC", stored)
    return case((instant >= literal_column("timestamptz '0001-01-02 00:00+00'"), instant))
