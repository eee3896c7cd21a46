"""Common: what a table has once, however many targets sweep it: its trigger, its indexes, a role.

The hazard is one target's `migrate` that takes from the table what another target's has given it.
So what there is once is made for all targets of the file that sweep the table, by whichever of
them; and where they do not go together that is refused, by name, before anything is made.

Another target is in the same database where its address says so; behind a Secret block of another
name it is not seen.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

from sqlalchemy import URL, Connection

from orphan_recovery.catalog import look_up
from orphan_recovery.database import address
from orphan_recovery.describe import describe_runs
from orphan_recovery.runs import RunsTable
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target, split_table
from orphan_recovery.targets import load_targets

FROZEN: Final = (
    *("status", "success", "error", "started_at", "completed_at"),
    *("worker_id", "tenant_id", "output_json"),
)
"""The roles that a terminal row keeps for ever, besides its key."""
_HELD = (*FROZEN, "created_at")


def is_guarded(target: Target) -> bool:
    """Whether the target asks for the truth trigger."""
    return target.is_default_table or target.truth_trigger


def for_all_targets(connection: Connection, runs: RunsTable) -> RunsTable:
    """The table by one description that does for all targets of the file that sweep it.

    In flight, and terminal, is what is so for any of them. Reads only.

    Raises:
        ConfigurationError: they do not go together, or one of them does not fit the table.
    """
    own = runs.target
    others = [
        describe_runs(connection, other)
        for other in _others(connection, own)
        if _oid(connection, other.table) == runs.relation.oid
    ]
    # In the order of their names, so that it is the same whichever target is at hand.
    every = sorted([runs, *others], key=lambda one: one.target.name)
    guarded = [one.target for one in every if is_guarded(one.target)]
    indexed = [one.target for one in every if one.target.index]
    if not others or not (guarded or indexed):
        return runs
    terminal = _union(target.ends or () for target in guarded)
    for other in (one.target for one in every):
        if revived := [word for word in other.in_flight if word in terminal]:
            guards = next(t.name for t in guarded if revived[0] in (t.ends or ()))
            raise ConfigurationError(
                f"targets {guards!r} and {other.name!r} both sweep {own.table!r}, and "
                f"{revived[0]!r} is terminal by the first, whose truth trigger keeps it for ever, "
                "and in flight by the second: set truth_trigger = false, or correct one of them"
            )
    columns = _columns(every)
    asked = {
        "in_flight": _union(target.in_flight for target in indexed) or own.in_flight,
        "terminal": terminal or own.terminal,
        "truth_trigger": bool(guarded),
        "index": bool(indexed),
        "columns": own.columns.model_copy(update=columns),
    }
    return describe_runs(connection, own.model_copy(update=asked), runs.relation)


def _columns(every: list[RunsTable]) -> dict[str, str]:
    """What the trigger and the index have to know, by role, of all that any target names."""
    columns: dict[str, str] = {}
    first = every[0]
    for one in every:
        names = {role: one.facts[role].name for role in _HELD if role in one.facts}
        unlike = [role for role, name in names.items() if columns.setdefault(role, name) != name]
        if one.target.columns.id != first.target.columns.id:
            unlike.insert(0, "id")
        if unlike or len(set(columns.values())) < len(columns):
            raise ConfigurationError(
                f"targets {first.target.name!r} and {one.target.name!r} both sweep "
                f"{one.target.table!r}, and mean other columns by {', '.join(unlike or columns)}: "
                "its index, and its truth trigger, are one for all; describe the columns alike, or "
                "set index and truth_trigger to false"
            )
    return columns


def others_name_it(connection: Connection, runs: RunsTable) -> bool:
    """Whether another target of the file sweeps the table, or reads signs of life there."""
    named = {
        elsewhere.table
        for other in _others(connection, runs.target)
        for elsewhere in (other, other.worker_heartbeat, other.run_events)
        if elsewhere is not None
    }
    return any(_oid(connection, name) == runs.relation.oid for name in named)


def _others(connection: Connection, own: Target) -> Iterator[Target]:
    """The other targets of the file that are in the same database."""
    targets = load_targets()
    if targets.get(own.name) != own:  # not of the file: made by code
        return
    for other in targets.values():
        if other.name == own.name:
            continue
        if other.database_url_secret or own.database_url_secret:
            is_here = other.database_url_secret == own.database_url_secret
        else:
            is_here = _place(other) == _of(connection.engine.url)
        if is_here:
            yield other


def _place(target: Target) -> tuple[Any, ...] | None:
    try:
        return _of(address(target))
    except ConfigurationError:  # its variable is not set here
        return None


def _of(url: URL) -> tuple[Any, ...]:
    return url.host or url.query.get("host"), url.port or 5432, url.database


def _oid(connection: Connection, table: str) -> int | None:
    found = look_up(connection, *split_table(table))
    return None if found is None else found.oid


def _union(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for part in parts for word in part))
