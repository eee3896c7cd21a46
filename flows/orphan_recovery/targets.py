"""Targets: which tables are swept, described in ``orphan-recovery.toml`` and the environment.

The hazard is a description that is half understood: a misspelt column that is quietly left out, a
rule that matches nothing, a sweep of another table than was meant. So every key is known or
refused, by its file or variable, its name and the way out; and nothing connects anywhere before
the whole file is understood.

Without a file there is one target, ``default``: the table ``worker_runs``.
"""

import difflib
import json
import os
import re
import tomllib
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from orphan_recovery.redact import redact
from orphan_recovery.settings import (
    CONFIG_VARIABLE,
    MAX_THRESHOLD_MINUTES,
    TARGET_VARIABLE,
    ConfigurationError,
    load_settings,
    own_environment,
)

CONFIG_FILE: Final = "orphan-recovery.toml"
DEFAULT_TARGET: Final = "default"
DEFAULT_TABLE: Final = "worker_runs"
DEFAULT_BEAT_SECONDS: Final = 10.0
"""Between two beats of a worker, where nobody said."""
LONGEST_LOCK_BEAT_SECONDS: Final = 30.0
"""A sweep waits two beats for a lock to be taken again, and a minute at most for anything."""
TARGETS_PREFIX: Final = "ORPHAN_RECOVERY_TARGETS"

_TARGET_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_TABLE_PART = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')
MATCHED: Final = ("task", "tenant_id", "worker_id", "status")
"""What a rule may look at."""


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

    @property
    def name(self) -> str:
        """What it matches, for the ledger."""
        return ", ".join(f"{column} = {text}" for column, text in self.match.items())


class Target(_Described):
    """One table that is swept: where it is, what its columns and statuses are called."""

    name: str = DEFAULT_TARGET
    database_url_env: Text | None = None
    """The environment variable that holds its database's address."""
    database_url_secret: Text | None = None
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
    """Whether `migrate` makes sure of the index that serves detection."""
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
            raise ValueError(f"crashed is {self.crashed!r}, which in_flight has too")
        for one, other in (("in_flight", "terminal"), ("in_flight", "waiting")):
            both = set(getattr(self, one)) & set(getattr(self, other) or ())
            if both:
                raise ValueError(f"{one} and {other} both have {', '.join(sorted(both))}")
        if self.terminal is not None and self.crashed not in self.terminal:
            raise ValueError(f"terminal does not have {self.crashed!r}, which crashed is")
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
    def ends(self) -> tuple[str, ...] | None:
        """The terminal statuses, those of the default table among them; None if unknown."""
        if self.terminal is None and self.is_default_table:
            return ("completed", "failed", "crashed")
        return self.terminal

    @property
    def crash_is_its_own_status(self) -> bool:
        """Whether nothing but a crash ends so. Elsewhere only the ledger tells crashes apart."""
        return self.crashed == "crashed"


class _Targets(BaseSettings):
    """The whole file; each value also by ``ORPHAN_RECOVERY_TARGETS__<TARGET>__<KEY>``."""

    model_config = SettingsConfigDict(
        env_prefix="ORPHAN_RECOVERY_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    targets: dict[str, Target] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: dict[str, Any]) -> dict[str, Any]:
        targets = data.get("targets")
        if not isinstance(targets, dict):
            return data
        named = {}
        for name, described in targets.items():
            if isinstance(described, dict):
                if "name" in described:
                    raise ValueError(f"targets.{name} has a key 'name': its heading is its name")
                described = {**described, "name": name}
            named[name] = described
        return {**data, "targets": named}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment comes before the file


def load_targets() -> dict[str, Target]:
    """All targets, by name, in the order of the file, as it and the environment are now.

    Raises:
        ConfigurationError: the file cannot be read, or something in it cannot be used. Names the
            file or variable, the key, the value and the way out. All that is wrong at once.
    """
    return dict(_targets(*_read_file(), own_environment()))


@lru_cache(maxsize=1)
def _targets(path: Path, text: str, _environment: tuple[tuple[str, str], ...]) -> dict[str, Target]:
    """To read them takes a millisecond; a sweep that finds nothing takes few."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    try:
        targets = _Targets(**data).targets
    except ValidationError as error:
        problems = [_explain(path, problem) for problem in error.errors()]
        raise ConfigurationError("; ".join(problems)) from None
    except ValueError as error:  # a variable that is no JSON where a list is wanted
        raise ConfigurationError(
            f"a variable {TARGETS_PREFIX}__… cannot be read: {error}; lists and tables are "
            "given as JSON there"
        ) from None
    _refuse_strangers(path, data, targets)
    alike: dict[str, str] = {}
    for name in targets:
        other = alike.setdefault(name.replace("_", "-"), name)
        if other != name:
            raise ConfigurationError(
                f"{path}: targets {other!r} and {name!r} differ only in - and _, so that what is "
                "named after them in Prefect would be the same: rename one"
            )
    return targets or {DEFAULT_TARGET: Target()}


def _refuse_strangers(path: Path, data: dict[str, Any], targets: dict[str, Target]) -> None:
    """A misspelt variable must not become a target of its own, on the default table."""
    described = data.get("targets", {})
    for name, target in targets.items():
        if name in described or name == DEFAULT_TARGET or "table" in target.model_fields_set:
            continue
        close = difflib.get_close_matches(name, [*described, DEFAULT_TARGET], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigurationError(
            f"a variable {TARGETS_PREFIX}__{name.upper()}__… is about a target {name!r}, which "
            f"{path} does not have: {hint}a target of the environment alone needs at least "
            f"{TARGETS_PREFIX}__{name.upper()}__TABLE"
        )


def find_target(name: str | None = None) -> Target:
    """The target of that name; without one, the target that is meant by default.

    That is the one that ``ORPHAN_RECOVERY_TARGET`` names, else ``default``, else the only one.

    Raises:
        ConfigurationError: there is no such target, or several and none of them is meant.
    """
    targets, asked = load_targets(), ""
    if name is None:
        name, asked = load_settings().target, f", which {TARGET_VARIABLE} names"
    if name is not None:
        if name not in targets:
            raise ConfigurationError(
                f"there is no target {name!r}{asked}; there is {', '.join(map(repr, targets))}"
                + ("" if _config_path() else f", and no file {CONFIG_FILE}")
            )
        return targets[name]
    if DEFAULT_TARGET in targets:
        return targets[DEFAULT_TARGET]
    if len(targets) == 1:
        return next(iter(targets.values()))
    raise ConfigurationError(
        f"which target? There is {', '.join(map(repr, targets))}: name one, by --target or "
        f"{TARGET_VARIABLE}, or call one {DEFAULT_TARGET!r}"
    )


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


def default_threshold() -> int:
    """The threshold in minutes of the target that is meant by default.

    Where several are configured and none is meant, that of the environment.

    Raises:
        ConfigurationError: the file, or a variable, cannot be used.
    """
    targets, settings = load_targets(), load_settings()
    if settings.target is None and DEFAULT_TARGET not in targets and len(targets) > 1:
        return settings.threshold_minutes
    return find_target().threshold_minutes


def where(target: Target, *keys: str) -> str:
    """Where a value was given, for an error: its variable, or its place in the file."""
    path = _config_path() or Path(CONFIG_FILE)
    return _place(path, ["targets", target.name, *keys])


def _place(path: Path, keys: list[str]) -> str:
    given_by = {name.upper() for name in os.environ}
    for length in range(len(keys), 0, -1):  # a variable may hold a whole table, as JSON
        variable = "__".join([TARGETS_PREFIX, *keys[1:length]]).upper()
        if variable in given_by:
            inside = ".".join(keys[length:])
            return f"{variable}: {inside}" if inside else variable
    return f"{path}: {'.'.join(keys)}"


def _config_path() -> Path | None:
    """The file to read, or None where there is none and none was named."""
    named = load_settings().config
    if named is not None:
        return named
    path = Path(CONFIG_FILE)
    return path if path.exists() else None


def _read_file() -> tuple[Path, str]:
    path = _config_path()
    if path is None:
        return Path(CONFIG_FILE), ""
    try:
        return path, path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{CONFIG_VARIABLE} names {str(path)!r}, which cannot be read ({error.strerror}): "
            "name the file that describes the targets, or unset it; for `init` to write to it, "
            "make an empty one first"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None


def _explain(path: Path, problem: Any) -> str:
    keys = [str(part) for part in problem["loc"]]
    place = _place(path, keys)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(keys)
        close = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{place} is no key: {hint}known are {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "Give")
    value = problem["input"]
    if isinstance(value, dict | list | tuple | BaseModel) or problem["type"] == "missing":
        return f"{place}: {message[0].lower()}{message[1:]}" if keys else f"{path}: {message}"
    return f"{place} is {redact(repr(value))}: {message[0].lower()}{message[1:]}"


def _known_keys(keys: list[str]) -> list[str]:
    """The keys that may stand where the last of ``keys`` does."""
    models: dict[str, type[BaseModel]] = {
        "columns": Columns,
        "worker_heartbeat": Elsewhere,
        "run_events": Elsewhere,
        "rules": Rule,
    }
    if len(keys) == 1:
        return ["targets"]
    model = models.get(keys[2], Target) if len(keys) > 3 else Target
    return [name for name in model.model_fields if (model, name) != (Target, "name")]
