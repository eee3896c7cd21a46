"""Guess: describe a table by looking at it, as a first draft for a person to correct.

The hazard is a guess that is taken for knowledge: so each one is written down with what it was
guessed from, what could not be guessed is said, and the draft is held against the database before
it is written. Nothing in the database changes.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from sqlalchemy import Column, Connection, MetaData, Table, Text, cast, func, select, text
from sqlalchemy.sql.elements import quoted_name

from orphan_recovery.catalog import ColumnFacts, Relation, look_up, similar
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target, split_table

# Without underscores and in lower case, so that createdAt and created_at are one; the likelier
# name first.
NAMES: Final[dict[str, tuple[str, ...]]] = {
    "status": ("status", "state", "jobstatus", "jobstate", "runstatus", "runstate", "phase"),
    "worker_id": (
        *("workerid", "worker", "lockedby", "claimedby", "attemptedby", "acquiredby", "takenby"),
        *("ownerid", "owner", "runnerid", "queuemanagerid", "processid", "nodeid", "hostname"),
    ),
    "tenant_id": (
        *("tenantid", "tenant", "organizationid", "orgid", "accountid", "workspaceid"),
        *("customerid", "teamid"),
    ),
    "task": (
        *("task", "taskname", "jobname", "jobtype", "jobclass", "entrypoint", "handler"),
        *("kind", "type", "function", "name", "jobid", "queue", "queuename"),
    ),
    "created_at": (
        *("createdat", "created", "createdon", "insertedat", "enqueuedat", "queuedat"),
        *("submittedat", "datecreated", "scheduledat", "runtime", "runat"),
    ),
    "started_at": (
        *("startedat", "started", "startedon", "starttime", "attemptedat", "claimedat"),
        *("lockedat", "pickedat", "acquiredat", "begunat", "beganat"),
    ),
    "heartbeat_at": (
        *("heartbeatat", "heartbeat", "heartbeaton", "lastheartbeatat", "lastheartbeat"),
        *("lastseenat", "lastseen", "lastbeat", "aliveat", "pingedat"),
    ),
    "completed_at": (
        *("completedat", "completed", "completedon", "finishedat", "finished", "endedat"),
        *("ended", "endtime", "finalizedat", "doneat"),
    ),
    "error": (
        *("error", "lasterror", "errormessage", "errortext", "exception", "failurereason"),
        *("traceback", "output"),
    ),
    "output_json": ("outputjson", "output", "result", "returnvalue"),
    "success": ("success", "succeeded", "issuccess", "ok"),
    "parent_run_id": ("parentrunid", "parentid", "retryof", "retriedfrom"),
    "attempt": ("attempt", "attempts", "attemptnumber", "retrycount", "retries", "tries"),
    "is_retry": ("isretry",),
}
_LIVE: Final = frozenset(
    (
        *("running", "doing", "active", "executing", "inprogress", "started", "processing"),
        *("picked", "working", "busy", "claimed", "startedexecution", "leased", "acquired"),
        "received",
    )
)
_WAITING: Final = frozenset(
    (
        *("queued", "pending", "todo", "available", "waiting", "scheduled", "created", "new"),
        *("ready", "deferred", "retry", "retryable", "retrying", "blocked", "paused"),
        *("enqueued", "submitted", "sent"),
    )
)
_ENDED: Final = frozenset(
    (
        *("completed", "complete", "success", "successful", "succeeded", "done", "finished"),
        *("executed", "failed", "failure", "error", "errored", "cancelled", "canceled"),
        *("crashed", "dead", "discarded", "aborted", "killed", "expired", "skipped"),
        *("exception", "timeout", "timedout", "missed", "deleted", "archived", "revoked"),
    )
)
_CRASHES: Final = ("crashed", "dead", "failed", "failure", "errored", "error", "exception")


GUESS_AGAIN: Final = "GUESS AGAIN"
"""How the draft begins what a person has to correct."""
SAY_WHICH: Final = "SAY WHICH"
SAY_WHAT: Final = "SAY WHAT"
"""What numbers and foreign words mean cannot be guessed, and a guess that works by chance could
crash what has ended: so these stand where a status is wanted, and are refused until corrected."""


@dataclass(slots=True)
class Draft:
    """A target's description, and what each line of it was guessed from."""

    target: str
    database_url_env: str
    lines: list[str] = field(default_factory=list)
    described: dict[str, Any] = field(default_factory=dict)

    def say(self, comment: str) -> None:
        self.lines.append(f"# {_one_line(comment)}")

    def set(self, key: str, value: Any, comment: str) -> None:
        self.described[key] = value
        self.lines.append(f"{key} = {_toml(value)}  # {_one_line(comment)}")

    def as_toml(self) -> str:
        """The section of the file."""
        return "\n".join([f"[targets.{self.target}]", *self.lines]) + "\n"


def draft_target(
    connection: Connection, name: str, table: str | None, database_url_env: str
) -> tuple[Target, str]:
    """Describe a table by looking at it. Reads only.

    Args:
        connection: to the database that holds it.
        name: of the target to be.
        table: ``table`` or ``schema.table``; None to look for the only one that will do.
        database_url_env: the variable that holds the database's address.

    Returns:
        The target, and its section of the file with a comment on each guess.

    Raises:
        ConfigurationError: there is no such table, several that will do, or no status, key or
            sign of life in it.
    """
    relation = _relation(connection, table)
    draft = Draft(name, database_url_env)
    draft.set("database_url_env", database_url_env, "the variable that holds its address")
    draft.set("table", _quoted(relation.schema, relation.name), f"a {relation.what}, found there")
    columns = _columns(relation)
    _statuses(connection, relation, columns["status"], draft)
    draft.say("threshold_minutes = 30  # the silence that makes an orphan; see `backtest`")
    section: list[str] = []
    heartbeat = _worker_table(connection, relation)
    if heartbeat is not None or "heartbeat_at" in columns:
        draft.say("heartbeat_seconds = 10  # how often workers beat; say so, or it is estimated")
    if heartbeat is not None and heartbeat[2] not in columns.values():
        columns.setdefault("worker_id", heartbeat[2])
    if heartbeat is None and not columns.keys() & {"created_at", "started_at", "heartbeat_at"}:
        raise ConfigurationError(
            f"{relation.name!r} has no source of signs of life: none of its columns (it has "
            f"{', '.join(relation.columns)}) looks like a time of creation, start or heartbeat"
        )
    _say_columns(relation, columns, section, draft, heartbeat is not None)
    if heartbeat is not None:
        workers, key, run_key, seen, why = heartbeat
        described = {"table": workers, "key": key, "run_key": run_key, "last_seen": seen.name}
        draft.described["worker_heartbeat"] = described
        section += ["", f"[targets.{name}.worker_heartbeat]  # {_one_line(why)}"]
        section += [f"{k} = {_toml(v)}" for k, v in described.items()]
        section[-1] += f"  # {_type(seen)}"
    try:
        target = Target(name=name, **draft.described)
    except ValueError as error:
        raise ConfigurationError(f"no draft could be made of {relation.name!r}: {error}") from None
    return target, draft.as_toml() + "\n".join(["", *section]) + "\n"


def _relation(connection: Connection, table: str | None) -> Relation:
    if table is not None:
        try:
            relation = look_up(connection, *split_table(table))
        except ValueError as error:
            raise ConfigurationError(f"--{error}") from None
        if relation is None:
            close = similar(connection, split_table(table)[1])
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ConfigurationError(
                f"--table is {table!r}, which is not in database "
                f"{connection.engine.url.database!r}: {hint}give it as schema.table, each name as "
                "the catalogue has it"
            )
        if not relation.is_table:
            raise ConfigurationError(
                f"--table is {table!r}, which is a {relation.what}: name the table it is made from"
            )
        if _pick(relation, "status") is None:
            raise ConfigurationError(
                f"no column of {table!r} looks like a status (it has "
                f"{', '.join(relation.columns)}): describe the table by hand, see docs/any-table.md"
            )
        return relation
    listing = text(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition"
        " AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'orphan_recovery')"
        " AND n.nspname NOT LIKE 'pg_toast%' ORDER BY 1, 2"
    )
    fitting, keyless = list[Relation](), list[Relation]()
    for schema, name in connection.execute(listing).all():
        relation = look_up(connection, schema, name)
        if relation is not None and _pick(relation, "status") and _pick(relation, "created_at"):
            (fitting if relation.unique else keyless).append(relation)
    if len(fitting) == 1:
        return fitting[0]
    database, way_out = connection.engine.url.database, "name the one that is, by --table"
    what = "a table of runs, by a status, a time of creation and a unique key"
    if fitting:
        raise ConfigurationError(
            f"{_listed(fitting)} of database {database!r} may each be {what}: {way_out} "
            "schema.table"
        )
    but = f" ({_listed(keyless)} would be, with a key)" if keyless else ""
    raise ConfigurationError(
        f"no table of database {database!r} looks like {what}{but}: {way_out} schema.table"
    )


def _listed(relations: list[Relation]) -> str:
    return ", ".join(_quoted(relation.schema, relation.name) for relation in relations)


def _columns(relation: Relation) -> dict[str, str]:
    picked: dict[str, str] = {}
    for role in NAMES:
        name = _pick(relation, role, taken=set(picked.values()))
        if name is not None:
            picked[role] = name
    return picked


def _pick(relation: Relation, role: str, taken: set[str] | None = None) -> str | None:
    """The column whose name is likeliest for ``role``, among those whose type is fit for it."""
    found = {
        _plain(name): name
        for name, facts in relation.columns.items()
        if _fits(role, facts) and name not in (taken or ())
    }
    return next((found[name] for name in NAMES[role] if name in found), None)


def _fits(role: str, facts: ColumnFacts) -> bool:
    if facts.is_generated and role in ("status", "error", "success", "completed_at"):
        return False
    if role.endswith("_at"):
        return facts.is_time
    if role in ("success", "is_retry"):
        return facts.kind == "bool"
    if role == "attempt":
        return facts.category == "N"
    if role in ("error", "output_json"):
        return facts.is_text or facts.kind in ("json", "jsonb")
    if role == "status":
        return facts.is_text or bool(facts.labels) or facts.category == "N"
    return facts.category != "A" and not facts.is_time


def _statuses(connection: Connection, relation: Relation, column: str, draft: Draft) -> None:
    facts = relation.columns[column]
    if facts.labels:
        values, source = list(facts.labels), f"the enum {facts.declared}"
    else:
        values, source = _found(connection, relation, facts), f"the rows' own {column}"
    kinds: dict[str, list[str]] = {"in_flight": [], "waiting": [], "terminal": [], "unknown": []}
    for value in values:
        plain = _plain(value)
        kind = next(
            (
                kind
                for kind, words in (
                    ("in_flight", _LIVE),
                    ("waiting", _WAITING),
                    ("terminal", _ENDED),
                )
                if plain in words
            ),
            "unknown",
        )
        kinds[kind].append(value)
    crashed = next((v for word in _CRASHES for v in values if _plain(v) == word), None)
    if not kinds["in_flight"]:
        draft.say(f"{GUESS_AGAIN}: which are in the hands of a worker?")
        none = f"None reads like that of {source}: {', '.join(values)}."
        draft.say(none if values else "There is no row yet to tell it by.")
        kinds["in_flight"] = [_as_others("running", values) if facts.is_text else SAY_WHICH]
    as_there = partial(_as_there, facts)
    in_flight = as_there(kinds["in_flight"])
    draft.set("in_flight", in_flight, f"in the hands of a worker; from {source}")
    if kinds["waiting"]:
        waiting = as_there(kinds["waiting"])
        draft.set("waiting", waiting, "held by no worker, so none can die holding it")
    if crashed is None:
        crashed = _as_others("failed", values) if facts.is_text else SAY_WHAT
        draft.say(f"{GUESS_AGAIN}: no status reads as a crash.")
    draft.set("crashed", as_there([crashed])[0], "what a crash is called here")
    terminal = list(dict.fromkeys([*kinds["terminal"], crashed]))
    draft.set("terminal", as_there(terminal), "ended for good")
    for value in kinds["unknown"]:
        draft.say(f"{GUESS_AGAIN}: what is {value!r}? Add it to in_flight, waiting or terminal.")


def _as_others(word: str, values: list[str]) -> str:
    """A status that is not there, in capitals where those are that are."""
    return word.upper() if "".join(values).isupper() else word


def _as_there(facts: ColumnFacts, values: list[str]) -> list[str | int]:
    """Statuses as people write them in the file: numbers as numbers."""
    numbers = facts.category == "N"
    return [int(v) if numbers and v.lstrip("-").isdecimal() else v for v in values]


def _found(connection: Connection, relation: Relation, facts: ColumnFacts) -> list[str]:
    """The statuses that rows have, by the planner's statistics and a sample of the table."""
    column: Column[Any] = Column(quoted_name(facts.name, quote=True), facts.type, key="status")
    table = Table(
        quoted_name(relation.name, quote=True),
        MetaData(),
        column,
        schema=quoted_name(relation.schema, quote=True),
    )
    sample = select(cast(table.c.status, Text).label("status")).limit(100_000).subquery()
    found = select(sample.c.status).where(sample.c.status.is_not(None))
    statement = found.group_by(sample.c.status)
    seen = set(connection.scalars(statement.order_by(func.count().desc()).limit(50)))
    common = text(
        "SELECT unnest(most_common_vals::text::text[]) FROM pg_stats WHERE schemaname = :schema"
        " AND tablename = :name AND attname = :column"
    )
    about = {"schema": relation.schema, "name": relation.name, "column": facts.name}
    seen.update(connection.scalars(common, about))
    return sorted(seen)


def _say_columns(
    relation: Relation, columns: dict[str, str], section: list[str], draft: Draft, by_worker: bool
) -> None:
    key = next(iter(sorted(relation.unique, key=len)), None)
    if key is None:
        raise ConfigurationError(
            f"{relation.name!r} has no unique index: give it a primary key, since a mark has to "
            "hit one row"
        )
    ordered = [name for name in relation.columns if name in key]
    described: dict[str, Any] = {"id": ordered[0] if len(ordered) == 1 else ordered}
    section.append(f"[targets.{draft.target}.columns]  # each guessed by its name and its type")
    section.append(f"id = {_toml(described['id'])}  # unique")
    for role, name in columns.items():
        described[role] = name
        section.append(f"{role} = {_toml(name)}  # {_type(relation.columns[name])}")
    for role in NAMES:
        if role not in described and role in relation.columns:
            described[role] = False
            section.append(f"{role} = false  # {_type(relation.columns[role])}: not fit for it")
    if "heartbeat_at" not in described and not by_worker:
        section.append("# No heartbeat found: a run shows only its age. Keep the threshold above")
        section.append("# the longest honest run.")
    used = {*ordered, *(name for role, name in described.items() if role != "id")}
    _say_what_is_left(relation, used, section)
    draft.described["columns"] = described


def _say_what_is_left(relation: Relation, used: set[Any], section: list[str]) -> None:
    left = [name for name in relation.columns if name not in used]
    times = [name for name in left if relation.columns[name].is_time]
    if times:
        names = ", ".join(_one_line(name) for name in times)
        section.append(f"# {GUESS_AGAIN}: {names}: is one of them created_at, started_at or")
        section.append("# heartbeat_at?")
    if others := [name for name in left if name not in times]:
        section.append(f"# Not used: {', '.join(_one_line(name) for name in others)}")


def _worker_table(
    connection: Connection, relation: Relation
) -> tuple[str, str, str, ColumnFacts, str] | None:
    """A table of workers with a last sign of life, that the runs point to by a foreign key."""
    statement = text(
        "SELECT a.attname AS run_key, n.nspname AS schema, c.relname AS name, f.attname AS key"
        " FROM pg_constraint k"
        " JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = k.conkey[1]"
        " JOIN pg_class c ON c.oid = k.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " JOIN pg_attribute f ON f.attrelid = k.confrelid AND f.attnum = k.confkey[1]"
        " WHERE k.conrelid = :oid AND k.contype = 'f' AND cardinality(k.conkey) = 1"
        " ORDER BY k.conname"
    )
    for row in connection.execute(statement, {"oid": relation.oid}).mappings():
        workers = look_up(connection, row["schema"], row["name"])
        seen = workers and _pick(workers, "heartbeat_at")
        if workers is not None and seen and workers.oid != relation.oid:
            why = f"by the foreign key of {row['run_key']}"
            name = _quoted(workers.schema, workers.name)
            return name, row["key"], row["run_key"], workers.columns[seen], why
    return None


def _type(facts: ColumnFacts) -> str:
    """A column's type for a comment; of a time without a zone, what it is taken for."""
    return _one_line(facts.declared) + (", read as UTC" if facts.kind == "timestamp" else "")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _quoted(schema: str, name: str) -> str:
    parts = (schema, name)
    if any(letter in '."' for part in parts for letter in part):
        return ".".join('"' + part.replace('"', '""') + '"' for part in parts)
    return ".".join(parts)


def _one_line(comment: str) -> str:
    return " ".join(comment.split())


def _toml(value: Any) -> str:
    """A value as TOML has it: JSON's strings and lists are TOML's, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
