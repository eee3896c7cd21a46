"""Any description of any table: generated ones, on the real database, against a plain model.

A case is a schema with names, types and words that nobody would choose, its description, and rows
whose times are drawn. A few lines of Python say which of them are orphans; recovery has to say the
same, mark those and no other, and write down those and no other.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from orphan_recovery.request import DEFAULT_REASON
from orphan_recovery.run import WorkerRun
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Columns, Elsewhere, Rule, Target
from orphan_recovery.targets import load_targets
from support import Database, database_of_its_own
from tables_support import seen, sweep

THRESHOLD = 30
AGES = (600, 600, 600, 61, 61, 31, 29, 1)
"""How many minutes ago things happened: each threshold lies between, and most are long ago."""
TIMES = ("created_at", "started_at", "heartbeat_at")
MATCHED = ("task", "tenant_id", "worker_id")

# Names: what Postgres allows, and what SQL, its drivers and our own statements give a meaning to.
NASTY = 'abzAZ09_$ \t\'""%%::()\\..{}[];,-*?/\u00e9\u00df\u5b57\U0001f600\u202e'
MEANT = (
    *("order", "select", "user", "table", "group", "null", "true", "default", "end", "case"),
    *("seen", "locked", "marked", "own", "other", "kept", "probe", "verdicts", "sweeps"),
    *("worker_heartbeat", "run_events", "seen_at", "sign_of_life", "evidence", "threshold"),
    *("rule", "reason", "run_id", "id_1", "vanished", "silent", "judged_at", "found", "param_1"),
    *("%s", "%(param_1)s", ":value", "$1", "a.b", 'a"b', "a'b", "a\\:b", "<value>", "--", "/*"),
    *("Job", "createdAt", "n'est pas", "x" * 40, "\u5b57" * 21, "now()", "*", "a::text"),
)
RESERVED = {"tableoid", "ctid", "xmin", "xmax", "cmin", "cmax"}  # every table has these


def fits(name: str) -> bool:
    return len(name.encode()) <= 63 and name not in RESERVED and name not in Columns.model_fields


def free(name: str) -> bool:
    return fits(name) and not name.startswith("pg_") and name not in KEPT


KEPT = {"public", "orphan_recovery", "information_schema"}
names = st.one_of(
    st.sampled_from(MEANT),
    st.text(alphabet=NASTY, min_size=1, max_size=40),
    st.text(
        alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
        min_size=1,
        max_size=20,
    ),
)
words = st.text(alphabet=NASTY, min_size=1, max_size=15) | st.sampled_from(["1", "done", "NULL"])
texts = st.text(alphabet="ab%_\\*?'", max_size=4)
"""What rules look at: short, and full of what a pattern may have in it."""

KEY_TYPES: dict[str, st.SearchStrategy[Any]] = {
    "text": st.text(alphabet=NASTY, max_size=10),
    "varchar(30)": st.text(alphabet=NASTY, max_size=10),
    "uuid": st.uuids(),
    "int": st.integers(-(2**31), 2**31 - 1),
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "date": st.dates(),
    "timestamptz": st.datetimes(
        datetime(1900, 1, 1),
        datetime(2100, 1, 1),
        timezones=st.just(UTC),
    ),
}
OPTIONAL_TYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("tenant_id", "task", "parent_run_id"), ("text", "varchar(60)")),
    "worker_id": ("text", "varchar(60)"),
    **dict.fromkeys((*TIMES, "completed_at"), ("timestamptz", "timestamp", "timestamp(3)")),
    "success": ("boolean",),
    "is_retry": ("boolean",),
    "attempt": ("int", "bigint", "smallint"),
    "error": ("text", "varchar", "varchar(80)", "json", "jsonb"),
    "output_json": ("json", "jsonb", "text"),
}
ROLES = tuple(OPTIONAL_TYPES)
STATUS_TYPES = ("text", "varchar", "varchar(15)", "enum", "domain", "checked domain")


@dataclass(frozen=True)
class Row:
    key: tuple[Any, ...]
    status: str
    ages: dict[str, int | None]
    """Minutes since each time of its own, by role."""
    texts: dict[str, str | None]
    """By role: what rules look at."""


@dataclass(frozen=True)
class Workers:
    """A table of the workers' heartbeats."""

    table: str
    key: str
    kind: str
    last_seen: str
    beats: tuple[tuple[str, int], ...]
    """Whose, and how many minutes ago."""


@dataclass(frozen=True)
class Case:
    schema: str | None
    """None: the table is found on the search path."""
    table: str
    type_name: str
    key: tuple[tuple[str, str], ...]
    """Name and type of each column of the key."""
    status: tuple[str, str]
    optional: dict[str, tuple[str, str]]
    """By role: name and type of the other columns that the table has."""
    left_out: frozenset[str]
    """The roles of columns that go by our name, and that recovery is told to leave alone."""
    bystander: str
    """A column that has no role."""
    released: bool
    in_flight: tuple[str, ...]
    waiting: tuple[str, ...]
    terminal: tuple[str, ...] | None
    ended: tuple[str, ...]
    """The words of runs that are over, told or not."""
    crashed: str
    workers: Workers | None
    rules: tuple[Rule, ...]
    rows: tuple[Row, ...]

    @property
    def roles(self) -> dict[str, tuple[str, str]]:
        """The optional columns that recovery may use."""
        return {r: c for r, c in self.optional.items() if r not in self.left_out}

    @property
    def target(self) -> Target:
        told: dict[str, Any] = dict.fromkeys(self.left_out, False)
        told |= {role: name for role, (name, _) in self.roles.items() if name != role}
        told["status"] = self.status[0]
        told["id"] = tuple(name for name, _ in self.key)
        workers = self.workers and Elsewhere(
            table=written(self.schema, self.workers.table),
            key=self.workers.key,
            run_key=self.optional["worker_id"][0],
            last_seen=self.workers.last_seen,
        )
        return Target(
            name="case",
            table=written(self.schema, self.table),
            in_flight=self.in_flight,
            waiting=self.waiting,
            terminal=self.terminal,
            crashed=self.crashed,
            threshold_minutes=THRESHOLD,
            heartbeat_seconds=0.001,  # so that no sweep waits for anybody to come back
            columns=Columns(**told),
            worker_heartbeat=workers,
            release=(self.bystander,) if self.released else (),
            rules=self.rules,
        )

    def silence(self, row: Row) -> int | None:
        """Minutes since the last sign of life; None if there is none."""
        return min((m for _, m in self._signs(row)), default=None)

    def evidence(self, row: Row) -> str:
        silence = self.silence(row)
        sources = {source for source, minutes in self._signs(row) if minutes == silence}
        for first in ("run heartbeat", "worker heartbeat"):
            if first in sources:
                return first
        return "age"

    def _signs(self, row: Row) -> list[tuple[str, int]]:
        own = {"heartbeat_at": "run heartbeat"}
        signs = [(own.get(role, "age"), m) for role, m in row.ages.items() if m is not None]
        if self.workers is not None:
            whose = row.texts["worker_id"]
            signs += [("worker heartbeat", m) for who, m in self.workers.beats if who == whose]
        return signs

    def rule(self, row: Row) -> Rule | None:
        """The first that matches."""
        texts = {**row.texts, "status": row.status}
        for rule in self.rules:
            if all(matches(texts[role], pattern) for role, pattern in rule.match.items()):
                return rule
        return None

    def is_orphan(self, row: Row) -> bool:
        silence, rule = self.silence(row), self.rule(row)
        threshold = THRESHOLD if rule is None else rule.threshold_minutes
        if row.status not in self.in_flight or silence is None or threshold is None:
            return False
        return silence >= threshold

    def reason(self, row: Row) -> str:
        rule = self.rule(row)
        if rule is None or (rule.reason is None and "status" not in rule.match):
            return DEFAULT_REASON
        return rule.reason or f"{DEFAULT_REASON}, while {rule.match['status']}"


def matches(text: str | None, pattern: str) -> bool:
    wild = {"*": ".*", "?": "."}
    expression = "".join(wild.get(character) or re.escape(character) for character in pattern)
    return text is not None and re.fullmatch(expression, text, re.DOTALL) is not None


def written(schema: str | None, table: str) -> str:
    """As a person writes it: in double quotes only where that is needed."""
    return ".".join(
        '"' + name.replace('"', '""') + '"' if set(name) & set('".') else name
        for name in (schema, table)
        if name is not None
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    schema, table, workers_table, type_name = draw(
        st.lists(names.filter(free), min_size=4, max_size=4, unique=True)
    )
    fresh = iter(draw(st.lists(names.filter(fits), min_size=22, max_size=22, unique=True)))
    own_or = st.booleans()

    kinds = draw(st.lists(st.sampled_from(list(KEY_TYPES)), min_size=1, max_size=3))
    key = [(next(fresh), kind) for kind in kinds]
    if draw(own_or):
        key[0] = ("id", key[0][1])
    status = ("status" if draw(own_or) else next(fresh), draw(st.sampled_from(STATUS_TYPES)))

    chosen = draw(st.sets(st.sampled_from(ROLES)))
    beating = draw(st.booleans())
    if beating:
        chosen |= {"worker_id"}
    if not beating and not chosen & set(TIMES):
        chosen |= {draw(st.sampled_from(TIMES))}
    optional = {
        role: (
            role if draw(own_or) else next(fresh),
            draw(st.sampled_from(OPTIONAL_TYPES[role])),
        )
        for role in ROLES
        if role in chosen
    }
    own = sorted(role for role, (name, _) in optional.items() if name == role)
    left_out = set(draw(st.sets(st.sampled_from(own)))) if own else set()
    if not beating and not (chosen - left_out) & set(TIMES):
        left_out -= set(TIMES)
    roles = [role for role in optional if role not in left_out]

    said = draw(st.lists(words, min_size=5, max_size=9, unique=True))
    in_flight, said = said[: (some := draw(st.integers(1, 3)))], said[some:]
    ended, waiting = said[:2], said[2:]
    crashed = draw(st.sampled_from([ended[0], "crashed"]).filter(lambda w: w not in in_flight))
    waiting = [word for word in waiting if word != crashed]
    ended = list(dict.fromkeys([*ended, crashed]))
    terminal = draw(st.sampled_from([None, tuple(ended)]))

    looked_at = [role for role in MATCHED if role in roles]
    patterns = {role: texts.filter(bool) for role in looked_at}
    patterns["status"] = st.sampled_from([*in_flight, "*", "?*"])
    rules = draw(
        st.lists(
            st.builds(
                Rule,
                match=st.fixed_dictionaries({}, optional=patterns).filter(bool),
                threshold_minutes=st.sampled_from([5, 60, 700]),
                reason=st.none() | texts.filter(str.strip),
            )
            | st.builds(
                Rule,
                match=st.fixed_dictionaries({}, optional=patterns).filter(bool),
                never=st.just(True),
            ),
            max_size=draw(st.sampled_from([0, 3])),
        )
    )

    told = [role for role in MATCHED if role in optional]
    rows = [
        Row(
            key=values,
            status=draw(st.sampled_from([*in_flight * 5, *waiting, *ended])),
            ages={role: draw(st.none() | st.sampled_from(AGES)) for role in TIMES if role in roles},
            texts={role: draw(st.none() | texts) for role in told},
        )
        for values in draw(
            st.lists(
                st.tuples(*(KEY_TYPES[kind] for kind in kinds)), min_size=4, max_size=8, unique=True
            )
        )
    ]
    workers = None
    if beating:
        known = sorted({row.texts["worker_id"] or "" for row in rows})
        beats = st.tuples(st.sampled_from(known), st.sampled_from(AGES))
        workers = Workers(
            table=workers_table,
            key=next(fresh),
            kind=draw(st.sampled_from(["text", "varchar(60)"])),
            last_seen=next(fresh),
            beats=tuple(draw(st.lists(beats, max_size=6))),
        )
    return Case(
        schema=schema if draw(st.booleans()) else None,
        table=table,
        type_name=type_name,
        key=tuple(key),
        status=status,
        optional=optional,
        left_out=frozenset(left_out),
        bystander=next(fresh),
        released=draw(st.booleans()),
        in_flight=tuple(in_flight),
        waiting=tuple(waiting),
        terminal=terminal,
        ended=tuple(ended),
        crashed=crashed,
        workers=workers,
        rules=tuple(rules),
        rows=tuple(rows),
    )


class World:
    """A case's table in the database: made, filled, read, and dropped again."""

    def __init__(self, db: Database, case: Case) -> None:
        self.case = case
        self.connection = db.connect(autocommit=True)
        self.connection.prepare_threshold = None  # the next table may have the same name
        self.schema = case.schema or "public"
        self.now: datetime = db.one("SELECT date_trunc('second', now())")
        self.table = sql.Identifier(self.schema, case.table)
        self.type = sql.Identifier(self.schema, case.type_name)

    def __enter__(self) -> "World":
        case, kind = self.case, self.case.status[1]
        if case.schema is not None:
            self.do("CREATE SCHEMA {}", sql.Identifier(self.schema))
        known = sql.SQL(", ").join([*case.in_flight, *case.waiting, *case.ended])
        if kind == "enum":
            self.do("CREATE TYPE {} AS ENUM ({})", self.type, known)
        elif kind == "domain":
            self.do("CREATE DOMAIN {} AS varchar(20)", self.type)
        elif kind == "checked domain":
            self.do("CREATE DOMAIN {} AS text CHECK (VALUE IN ({}))", self.type, known)
        status = self.type if kind in ("enum", "domain", "checked domain") else sql.SQL(kind)
        columns = [*case.key, *case.optional.values(), (case.bystander, "text")]
        self.do(
            "CREATE TABLE {} ({}, {} {}, PRIMARY KEY ({}))",
            self.table,
            sql.SQL(", ").join(
                sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind))
                for name, kind in columns
            ),
            sql.Identifier(case.status[0]),
            status,
            sql.SQL(", ").join(sql.Identifier(name) for name, _ in case.key),
        )
        for row in case.rows:
            self.add(row)
        if case.workers is not None:
            self.add_workers(case.workers)
        return self

    def __exit__(self, *_: object) -> None:
        with self.connection:
            self.drop()

    def drop(self) -> None:
        if self.case.schema is not None:
            self.do("DROP SCHEMA {} CASCADE", sql.Identifier(self.schema))
            return
        self.do("DROP TABLE {}", self.table)
        if self.case.workers is not None:
            self.do("DROP TABLE {}", sql.Identifier(self.schema, self.case.workers.table))
        if self.case.status[1] in ("enum", "domain", "checked domain"):
            what = "TYPE" if self.case.status[1] == "enum" else "DOMAIN"
            self.do(f"DROP {what} {{}}", self.type)

    def do(self, template: str, *parts: Any) -> list[dict[str, Any]]:
        cursor = self.connection.execute(sql.SQL(template).format(*parts))
        return cursor.fetchall() if cursor.description else []

    def add(self, row: Row) -> None:
        case = self.case
        values: dict[str, Any] = {name: v for (name, _), v in zip(case.key, row.key, strict=True)}
        values[case.status[0]] = row.status
        values[case.bystander] = "kept"
        ago = {role: self.ago(case.optional[role][1], m) for role, m in row.ages.items()}
        for role, value in {**ago, **row.texts}.items():
            values[case.optional[role][0]] = value
        self.do(
            "INSERT INTO {} ({}) VALUES ({})",
            self.table,
            sql.SQL(", ").join(map(sql.Identifier, values)),
            sql.SQL(", ").join(values.values()),
        )

    def add_workers(self, workers: Workers) -> None:
        table = sql.Identifier(self.schema, workers.table)
        self.do(
            "CREATE TABLE {} ({} {}, {} timestamp)",
            table,
            sql.Identifier(workers.key),
            sql.SQL(workers.kind),
            sql.Identifier(workers.last_seen),
        )
        for who, minutes in workers.beats:
            self.do("INSERT INTO {} VALUES ({}, {})", table, who, self.ago("timestamp", minutes))

    def ago(self, kind: str, minutes: int | None) -> datetime | None:
        if minutes is None:
            return None
        at = self.now - timedelta(minutes=minutes)
        return at if kind == "timestamptz" else at.astimezone(UTC).replace(tzinfo=None)

    def rows(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Every row by its key: each column, and the transaction that wrote it last."""
        keys = sql.SQL(", ").join(sql.Identifier(name) for name, _ in self.case.key)
        found = self.do(
            "SELECT ARRAY[xmin::text, t::text] AS version, to_jsonb(t) AS columns, {} FROM {} AS t",
            keys,
            self.table,
        )
        return {
            tuple(row[name] for name, _ in self.case.key): {
                "version": row["version"],
                **row["columns"],
            }
            for row in found
        }


def key_of(case: Case, run_id: str) -> tuple[Any, ...]:
    """A run's key in the types of its columns."""
    parts = [run_id] if len(case.key) == 1 else json.loads(run_id)
    read: dict[str, Any] = {
        **dict.fromkeys(("int", "bigint"), int),
        "uuid": UUID,
        "date": date.fromisoformat,
        "timestamptz": datetime.fromisoformat,
    }
    return tuple(read.get(kind, str)(p) for (_, kind), p in zip(case.key, parts, strict=True))


def as_toml(target: Target) -> str:
    """The description as a file has it."""

    def value(told: Any) -> str:
        if isinstance(told, dict):
            return "{" + ", ".join(f"{k} = {value(v)}" for k, v in told.items()) + "}"
        if isinstance(told, tuple):
            return f"[{', '.join(map(value, told))}]"
        if isinstance(told, str):  # JSON's way is TOML's too, but for one character
            return json.dumps(told, ensure_ascii=False).replace("\x7f", "\\u007f")
        return json.dumps(told)

    told = target.model_dump(exclude={"name"}, exclude_none=True)
    told["columns"] = {role: name if name else False for role, name in told["columns"].items()}
    return "[targets.case]\n" + "".join(f"{key} = {value(v)}\n" for key, v in told.items())


@pytest.fixture(scope="module")
def db(server: str) -> Iterator[Database]:
    """One database for all cases; each has its own schema, or cleans up behind it."""
    with (
        database_of_its_own(server) as url,
        Database(url) as database,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
        yield database


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where targets are described."""
    path = tmp_path_factory.mktemp("described") / "orphan-recovery.toml"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ORPHAN_RECOVERY_CONFIG", str(path))
        yield path


@settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=cases())
def test_exactly_the_orphans_are_found_and_marked_whatever_the_table_is_called(
    db: Database, file: Path, case: Case
) -> None:
    target = case.target
    file.write_text(as_toml(target), encoding="utf-8")
    assert load_targets() == {"case": target}

    with World(db, case) as world:
        migrate(target)
        before = world.rows()
        assert len(before) == len(case.rows)
        expected = {row.key: row for row in case.rows if case.is_orphan(row)}

        found = asyncio.run(seen(db, target))
        check_snapshots(case, world, expected, found)
        assert world.rows() == before, "detection only reads"

        report = asyncio.run(sweep(target))
        assert report.error is None
        assert [verdict.error for verdict in report.verdicts if verdict.error] == []
        assert (report.detected, report.recovered) == (len(expected), len(expected))
        after = world.rows()
        assert {key for key in before if after[key] != before[key]} == set(expected)
        for key, row in expected.items():
            check_mark(case, world, row, before[key], after[key])
        check_ledger(case, expected, found, db.do(LEDGER, report.request.sweep_id))
        assert report.fleet is not None
        flying = [row for row in case.rows if row.status in case.in_flight]
        exempt = [row for row in flying if (rule := case.rule(row)) and rule.never]
        undatable = [row for row in flying if case.silence(row) is None]
        counts = (report.fleet.in_flight, report.fleet.exempt, report.fleet.undatable)
        assert counts == (len(flying), len(exempt), len(undatable))

        assert asyncio.run(sweep(target)).detected == 0
        assert world.rows() == after
        assert migrate(target).done == ()


LEDGER: LiteralString = "SELECT * FROM orphan_recovery.verdicts WHERE sweep_id = %s"


def check_snapshots(
    case: Case, world: World, expected: dict[tuple[Any, ...], Row], found: list[WorkerRun]
) -> None:
    assert {key_of(case, run.id) for run in found} == set(expected)
    assert len(found) == len(expected)
    assert [run.sign_of_life for run in found] == sorted(run.sign_of_life for run in found)
    for run in found:
        row = expected[key_of(case, run.id)]
        silence = case.silence(row)
        assert silence is not None
        assert run.sign_of_life == world.now - timedelta(minutes=silence)
        assert run.evidence == case.evidence(row)
        assert run.status == row.status
        for role in MATCHED:
            assert getattr(run, role) == (row.texts[role] if role in case.roles else None)
        rule = case.rule(row)
        minutes = THRESHOLD if rule is None else rule.threshold_minutes
        assert run.threshold == timedelta(minutes=minutes or 0)


def check_mark(
    case: Case, world: World, row: Row, before: dict[str, Any], after: dict[str, Any]
) -> None:
    written = {"status": case.status[0]}
    written |= {
        r: case.roles[r][0] for r in ("success", "error", "completed_at") if r in case.roles
    }
    assert after[written["status"]] == case.crashed
    if "success" in written:
        assert after[written["success"]] is False
    if "error" in written:
        room = 80 if case.roles["error"][1] == "varchar(80)" else None
        wanted = f"{case.reason(row)}; last sign of life "
        assert after[written["error"]].startswith(wanted[:room])
    if "completed_at" in written:
        at = datetime.fromisoformat(after[written["completed_at"]])
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        assert timedelta(0) <= at - world.now < timedelta(minutes=1)
    assert after[case.bystander] == (None if case.released else "kept")
    touched = {"version", case.bystander, *written.values()}
    assert {k: v for k, v in after.items() if k not in touched} == {
        k: v for k, v in before.items() if k not in touched
    }


def check_ledger(
    case: Case,
    expected: dict[tuple[Any, ...], Row],
    found: list[WorkerRun],
    verdicts: list[dict[str, Any]],
) -> None:
    runs = {run.id: run for run in found}
    assert {v["run_id"] for v in verdicts} == set(runs)
    for verdict in verdicts:
        run, row = runs[verdict["run_id"]], expected[key_of(case, verdict["run_id"])]
        assert (verdict["outcome"], verdict["target"]) == ("marked", "case")
        assert (verdict["status_seen"], verdict["reason"]) == (row.status, case.reason(row))
        names = ("worker_id", "tenant_id", "task", "sign_of_life", "threshold", "rule", "evidence")
        assert [verdict[name] for name in names] == [getattr(run, name) for name in names]
