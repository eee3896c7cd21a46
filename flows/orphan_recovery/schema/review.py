"""Review: what `migrate` would do to a database, as SQL for a DBA to read. Executes nothing.

The hazard is a script that says something else than what is done: so it is printed from the very
statements that `migrate` executes.
"""

from sqlalchemy import Connection, func, select

from orphan_recovery.describe import describe_runs
from orphan_recovery.ledger import SCHEMA
from orphan_recovery.schema.common import others_name_it
from orphan_recovery.schema.ddl import changes
from orphan_recovery.schema.grants import role_statements, worker_statements
from orphan_recovery.schema.migrate import VERSION_TABLE, default_table, ledger_sql, revisions
from orphan_recovery.target import Target


def as_sql(
    connection: Connection, target: Target, role: str, worker_role: str | None = None
) -> str:
    """All that is still to be done, as a script for psql.

    Args:
        connection: to the target's database; only read from.
        target: whose table it is about.
        role: the role that shall sweep.
        worker_role: the role that workers have, where they use :mod:`orphan_recovery.alive`.

    Raises:
        ConfigurationError: the target does not fit its database.
    """
    there = revisions(connection)
    database = str(connection.scalar(select(func.current_database())))
    parts = [
        f"-- What orphan-recovery needs for its target {target.name!r},",
        f"-- table {_line(target.table)}.",
        "-- Run it as the owner of the table, with the right to create a schema and a role:",
        f'--   orphan-recovery sql --target {target.name} | psql -v ON_ERROR_STOP=1 "$OWNER_URL"',
        "",
    ]
    if any(name.startswith("ledger") for name in there):
        parts += [f"-- The ledger is there already, in schema {SCHEMA}.", ""]
    else:
        parts += [
            "-- The ledger: sweeps and verdicts, append-only; and the function that a truth",
            "-- trigger calls, where there is one.",
            ledger_sql(),
            "",
        ]
    if target.is_default_table and "runs_0001" not in there:
        statements, runs = default_table(connection, target)
        version = f"INSERT INTO {SCHEMA}.{VERSION_TABLE} VALUES ('runs_0001')"  # noqa: S608
        parts += ["-- The runs table.", "BEGIN;", *(f"{s};" for s in (*statements, version))]
        parts += ["COMMIT;", ""]
    else:
        runs = describe_runs(connection, target)
    for change in changes(connection, runs):
        alone = "; each statement by itself, outside any transaction" if change.alone else ""
        parts.append(f"-- {_line(change.why[0].upper() + change.why[1:])}{alone}.")
        parts += [f"{statement.as_string(None)};" for statement in change.statements]
        parts.append("")
    granted = role_statements(runs, role, database, is_shared=others_name_it(connection, runs))
    parts += [
        "-- A role that may do what a sweep does, and nothing else. It has no password yet.",
        "BEGIN;",
        *(f"{statement.as_string(None)};" for statement in granted),
        "COMMIT;",
    ]
    if worker_role is not None:
        parts += ["", "-- What workers need to record a contested verdict."]
        parts += [f"{statement.as_string(None)};" for statement in worker_statements(worker_role)]
    return "\n".join(parts)


def _line(comment: str) -> str:
    """A comment ends with its line: a name that has a second one would be executed."""
    return " ".join(comment.split())
