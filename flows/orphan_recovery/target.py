"""Target: one table that is swept, as it is described: what its columns and statuses are called.

The hazard is a description that is half understood, or at odds with itself. So each value has a
type that refuses what cannot be meant, and what two of them say together is checked here, before
anything connects anywhere.
"""

import json
import re
from datetime import timedelta
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_settings import NoDecode

from orphan_recovery.settings import MAX_THRESHOLD_MINUTES, load_settings

DEFAULT_TARGET: Final = "default"
DEFAULT_TABLE: Final = "worker_runs"
DEFAULT_BEAT_SECONDS: Final = 10.0
"""Between two beats of a worker, where nobody said."""
BEATS_IN_A_THRESHOLD: Final = 3
"""Beats that have to fit into a threshold: one may be lost, and one be late."""
GRACE_BEATS: Final = 2
"""Beats that whoever lives is given to come back after nobody could write: one to find the
connection broken, one to beat over a new one. Who cannot take its lock again within them knows by
itself that it may be judged."""
LONGEST_LOCK_BEAT_SECONDS: Final = 30.0
"""A sweep waits two beats for a lock to be taken again, and a minute at most for anything."""
MATCHED: Final = ("task", "tenant_id", "worker_id", "status")
"""What a rule may look at."""

_TARGET_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_TABLE_PART = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')


def split_table(name: str) -> tuple[str | None, str]:
    """``schema.table`` as its two names; each as the catalogue has it, or in double quotes.

    Raises:
        ValueError: it is not one or two names.
    """
    parts, rest = [], name
    while match := _TABLE_PART.match(rest):
        quoted, plain = match.groups()
        parts.append(quoted.replace('""', '"') if quoted else plain)
        rest = rest[match.end() :]
        if not rest.startswith("."):
            break
        rest = rest[1:]
        if not rest:
            break
    if rest or not 1 <= len(parts) <= 2 or name.endswith("."):
        raise ValueError(
            f"table is {name!r}: give table or schema.table, a name that has a dot or a double "
            'quote in it in double quotes, such as "my.schema"."my.table"'
        )
    return (parts[0], parts[1]) if len(parts) == 2 else (None, parts[0])


def _column(value: object) -> object:
    if value is False or value == "false":
        return ""
    if not isinstance(value, str) or not value:
        raise ValueError("give a column's name as the database has it, or false to leave it out")
    return value


def _key(value: object) -> object:
    if isinstance(value, str) and not value.startswith("["):  # one name, of the file or a variable
        return (value,)
    return _listed(value)


def _listed(value: object) -> object:
    """A list; from a variable it comes as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list | tuple):
        raise ValueError('give a list, such as ["queued", "running"]; in a variable, as JSON')
    return value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("give a number")
    return value


def _table(value: str) -> str:
    split_table(value)
    return value


def _fitting(pattern: str, told: str) -> AfterValidator:
    """What does not fit is not shown: it may be an address, with its password."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(told)
        return value

    return AfterValidator(check)


def _words(value: object) -> object:
    """Statuses may be numbers in the table; they are compared as text."""
    value = _listed(value)
    if isinstance(value, list | tuple):
        return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
    return value


def _word(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, Field(min_length=1)]
ColumnName = Annotated[str | None, BeforeValidator(_column)]
"""None: the same name as here, if the table has it. Empty: left alone, whatever the table has."""
Status = Annotated[Text, BeforeValidator(_word)]
Statuses = Annotated[tuple[Text, ...], NoDecode, BeforeValidator(_words)]
Minutes = Annotated[int, BeforeValidator(_number), Field(ge=1, le=MAX_THRESHOLD_MINUTES)]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, le=60 * MAX_THRESHOLD_MINUTES)]
TableName = Annotated[Text, AfterValidator(_table)]
Variable = Annotated[
    Text,
    _fitting(
        r"[A-Za-z_][A-Za-z0-9_]*",
        "give the name of a variable that holds the address, not the address",
    ),
]
Block = Annotated[
    Text,
    _fitting(
        r"[a-z0-9-]+",
        "give the name of a Prefect Secret block, of lower-case letters, digits and dashes",
    ),
]


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Columns(_Described):
    """What the table's columns are called there. Everything but id and status is optional."""

    id: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(_key), Field(min_length=1)] = ("id",)
    """The key: one column, or several that are unique together."""
    status: Text = "status"
    worker_id: ColumnName = None
    tenant_id: ColumnName = None
    task: ColumnName = None
    created_at: ColumnName = None
    started_at: ColumnName = None
    heartbeat_at: ColumnName = None
    success: ColumnName = None
    error: ColumnName = None
    completed_at: ColumnName = None
    output_json: ColumnName = None
    parent_run_id: ColumnName = None
    attempt: ColumnName = None
    is_retry: ColumnName = None


class Elsewhere(_Described):
    """Signs of life that are kept in another table: of the run's worker, or of its own events."""

    table: TableName
    key: Text
    """The column there that says whose they are."""
    run_key: Text
    """The column of the runs table that holds the same."""
    last_seen: Text
    """The column with the times; the latest counts."""


class Rule(_Described):
    """Another threshold, or none at all, for some runs. The first that matches wins."""

    match: dict[str, Text] = Field(min_length=1)
    """Column to text; ``*`` stands for any text and ``?`` for any one character."""
    threshold_minutes: Minutes | None = None
    never: bool = False
    reason: Text | None = None
    """What the error text of such a run begins with, unless who asked for the sweep says."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if unknown := [name for name in self.match if name not in MATCHED]:
            raise ValueError(
                f"match looks at {', '.join(map(repr, unknown))}: it may look at "
                + ", ".join(MATCHED)
            )
        if self.never == (self.threshold_minutes is not None):
            raise ValueError("give either threshold_minutes, or never = true")
        return self

    def __hash__(self) -> int:  # a dict has none of its own
        kept = (self.threshold_minutes, self.never, self.reason)
        return hash((*sorted(self.match.items()), *kept))

    def may_match_status(self, statuses: tuple[str, ...]) -> bool:
        """Whether one of ``statuses`` fits; so it does where the rule does not look at it.

        Whatever its case: there are columns to which it is all one.
        """
        pattern = re.escape(self.match.get("status", "*").lower())
        pattern = pattern.replace(r"\*", ".*").replace(r"\?", ".")
        return any(re.fullmatch(pattern, status.lower(), re.DOTALL) for status in statuses)

    @property
    def name(self) -> str:
        """What it matches, for the ledger."""
        return ", ".join(f"{column} = {text}" for column, text in self.match.items())


class Target(_Described):
    """One table that is swept: where it is, what its columns and statuses are called."""

    name: str = DEFAULT_TARGET
    database_url_env: Variable | None = None
    """The environment variable that holds its database's address."""
    database_url_secret: Block | None = None
    """The Prefect Secret block that holds it."""
    table: TableName = DEFAULT_TABLE
    in_flight: Annotated[Statuses, Field(min_length=1)] = ("queued", "running")
    crashed: Status = "crashed"
    """What a crash is called there."""
    terminal: Statuses | None = None
    """The statuses of runs that have ended; None where nobody said."""
    waiting: Statuses = ()
    """Known, and none of recovery's business: runs that no worker holds."""
    threshold_minutes: Minutes = Field(default_factory=lambda: load_settings().threshold_minutes)
    heartbeat_seconds: Seconds | None = None
    """How often workers beat, if it is known; `doctor` measures it where it is not."""
    lock: Literal["run", "worker"] | None = None
    """Whether workers hold a session-level advisory lock for as long as they live, and for what:
    each run, or each worker."""
    index: bool = True
    """Whether `migrate` builds its indexes: of what is in flight, for detection; and of crashed
    runs, where a crash has a status of its own, for the summary."""
    truth_trigger: bool = False
    """Whether `migrate` makes terminal rows immutable; always so for the default table."""
    columns: Columns = Columns()
    worker_heartbeat: Elsewhere | None = None
    """Signs of life per worker, in a table of workers."""
    run_events: Elsewhere | None = None
    """Signs of life per run, in a table of its events or attempts."""
    hold_share: Share = 0.5
    """Above this share of its workers silent, a sweep looks twice, and then stops and asks."""
    hold_least_workers: Annotated[int, BeforeValidator(_number), Field(ge=1)] = 10
    """In a fleet with fewer workers in flight, the share says nothing."""
    contest_limit: Share = 0.01
    """Above this share of contested verdicts every sweep warns."""
    orphans_per_second: Annotated[int | None, BeforeValidator(_number), Field(ge=1)] = None
    """At most so many are marked a second, where they have no task run each: by slices in all
    sweeps of the table together, page by page in each; None: as many as the server can, and
    few while others write to it."""
    release: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Columns that the mark sets to NULL, where what they hold keeps a slot taken."""
    rules: Annotated[tuple[Rule, ...], NoDecode, BeforeValidator(_listed)] = ()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(set(self.columns.id)) < len(self.columns.id):
            raise ValueError("columns.id has a column twice")
        if self.database_url_env and self.database_url_secret:
            raise ValueError(
                "database_url_env and database_url_secret are both given: a target has one source"
            )
        if not _TARGET_NAME.fullmatch(self.name):
            raise ValueError(
                f"the target's name is {self.name!r}: give lower-case letters, digits, - and _, "
                "beginning with a letter"
            )
        if self.crashed in self.in_flight:
            raise ValueError(
                f"crashed is {self.crashed!r}, which in_flight has too: a mark must end a run; "
                "give another status"
            )
        for one, other in (("in_flight", "terminal"), ("in_flight", "waiting")):
            both = set(getattr(self, one)) & set(getattr(self, other) or ())
            if both:
                raise ValueError(f"{one} and {other} both have {', '.join(sorted(both))}")
        if self.terminal is not None and self.crashed not in self.terminal:
            raise ValueError(f"crashed is {self.crashed!r}, which terminal does not have")
        if self.truth_trigger and self.terminal is None:
            raise ValueError("truth_trigger needs to know the terminal statuses: give terminal")
        used: dict[str, str] = {}
        for role, column in self.named_columns():
            if role == "id" and column not in used:  # a part of the key may have a role besides
                continue
            if column in used:
                raise ValueError(f"{used[column]} and {role} are both the column {column!r}")
            used[column] = role
        written = {self.columns.status, self.columns.error, self.columns.completed_at}
        if self.lock is not None and self.beat.total_seconds() > LONGEST_LOCK_BEAT_SECONDS:
            raise ValueError(
                f"heartbeat_seconds is {self.heartbeat_seconds:g}: with lock, give at most "
                f"{LONGEST_LOCK_BEAT_SECONDS:g}, since a sweep waits two beats and no more than a "
                "minute"
            )
        if kept := [name for name in self.release if name in {*written, *self.columns.id}]:
            raise ValueError(f"release has {kept[0]!r}, which the mark writes or is the key")
        return self

    def named_columns(self) -> list[tuple[str, str]]:
        """Role and column for every column that is named, not merely supposed."""
        named = [("id", column) for column in self.columns.id]
        for role in Columns.model_fields:
            column = getattr(self.columns, role)
            if role != "id" and column:
                named.append((role, column))
        return named

    @property
    def is_default_table(self) -> bool:
        """The project's own table, which `migrate` creates or adopts."""
        own = Target(name=self.name, threshold_minutes=self.threshold_minutes)
        same = ("table", "in_flight", "crashed", "columns")
        return all(getattr(self, name) == getattr(own, name) for name in same)

    @property
    def beat(self) -> timedelta:
        """Between two beats of a worker, where it is not measured."""
        return timedelta(seconds=self.heartbeat_seconds or DEFAULT_BEAT_SECONDS)

    @property
    def shortest_threshold(self) -> timedelta:
        """The shortest that a run may have by itself: the target's own, or a rule's."""
        rules = [rule.threshold_minutes for rule in self.rules if rule.threshold_minutes]
        return timedelta(minutes=min([self.threshold_minutes, *rules]))

    @property
    def ends(self) -> tuple[str, ...] | None:
        """The terminal statuses, those of the default table among them; None if unknown."""
        if self.terminal is None and self.is_default_table:
            return ("completed", "failed", "crashed")
        return self.terminal

    @property
    def crash_is_its_own_status(self) -> bool:
        """Whether nothing but a crash ends so. Elsewhere only the ledger tells crashes apart."""
        return self.crashed == "crashed"
