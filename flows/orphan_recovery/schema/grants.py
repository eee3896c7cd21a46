"""Grants: the role that sweeps, as statements for the tables' owner: what a sweep does, no more.

The hazard is a role that may do more than it needs, or that one target's statements take from it
what another of its targets needs. So what it had of the table is taken back first, and then given
anew; but not where another target of the file reads or sweeps that table.
"""

from typing import Final

from psycopg import sql

from orphan_recovery.ledger import SCHEMA
from orphan_recovery.runs import RunsTable
from orphan_recovery.schema.ddl import compose, names_of
from orphan_recovery.settings import ConfigurationError

WRITTEN: Final = ("status", "success", "error", "completed_at")
"""The roles that a mark writes."""


def role_statements(
    runs: RunsTable, role: str, database: str, *, is_shared: bool = False
) -> list[sql.Composed]:
    """A role that may do what a sweep does, and nothing else; as the owner of the tables.

    It may read what detection reads, write what a mark writes, and append to the ledger. It is
    created without a password. Other tables with signs of life are only ever read.

    Args:
        runs: the table.
        role: the name.
        database: the name of the table's database.
        is_shared: whether another target names the table too, which the role may sweep as well:
            then nothing that it has there is taken back.
    """
    if not 1 <= len(role.encode()) <= 63:
        raise ConfigurationError(f"role is {role!r}: give a name of 1 to 63 bytes")
    who, ledger = sql.Identifier(role), sql.Identifier(SCHEMA)
    table = sql.Identifier(runs.relation.schema, runs.relation.name)
    # Not the result: a sweep has no business with it.
    read = [column.name for column in runs.columns if column.key != "output_json"]
    create = compose(  # a literal, not dollar quotes: they may be in the name
        "BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {}) "
        "THEN CREATE ROLE {} LOGIN; END IF; END",
        sql.Literal(role),
        who,
    )
    statements = [
        compose("DO {}", sql.Literal(create.as_string(None))),
        compose("GRANT CONNECT ON DATABASE {} TO {}", sql.Identifier(database), who),
        compose("REVOKE ALL ON SCHEMA {} FROM {}", ledger, who),
        compose("REVOKE ALL ON ALL TABLES IN SCHEMA {} FROM {}", ledger, who),
    ]
    if not is_shared:
        statements.append(compose("REVOKE ALL ON {} FROM {}", table, who))
    statements += [
        compose("GRANT USAGE ON SCHEMA {} TO {}", names_of(_schemas(runs)), who),
        compose(
            "GRANT SELECT ({}), UPDATE ({}) ON {} TO {}",
            names_of(read),
            names_of(written_columns(runs)),
            table,
            who,
        ),
        compose(
            "GRANT SELECT, INSERT ON {0}.sweeps, {0}.verdicts, {0}.holds, {0}.hold_runs, "
            "{0}.approvals TO {1}",
            ledger,
            who,
        ),
        compose(
            "GRANT UPDATE (ended_at, ended_as, detected, marked, missed, failed, looked_twice, "
            "hold, error) ON {}.sweeps TO {}",
            ledger,
            who,
        ),
        compose("GRANT UPDATE (ended_at, ended_as, ended_by) ON {}.holds TO {}", ledger, who),
        compose("GRANT SELECT ON {0}.contests, {0}.schema_version TO {1}", ledger, who),
    ]
    for kept in runs.elsewhere.values():
        columns = names_of([column.name for column in kept.table.c])
        name = sql.Identifier(kept.relation.schema, kept.relation.name)
        statements.append(compose("GRANT SELECT ({}) ON {} TO {}", columns, name, who))
    return statements


def _schemas(runs: RunsTable) -> list[str]:
    """Where the tables are, and the types by whose name a sweep writes its values."""
    released = [runs.relation.columns[column.name] for column in runs.released]
    types = {fact.schema for fact in (*runs.facts.values(), *released)} - {"pg_catalog"}
    tables = {runs.relation.schema, *(kept.relation.schema for kept in runs.elsewhere.values())}
    return sorted({SCHEMA} | types | tables)


def worker_statements(role: str) -> list[sql.Composed]:
    """What a role that workers have needs besides its own table: to record a contested verdict."""
    who, ledger = sql.Identifier(role), sql.Identifier(SCHEMA)
    return [
        compose("GRANT USAGE ON SCHEMA {} TO {}", ledger, who),
        compose("GRANT SELECT ON {}.verdicts TO {}", ledger, who),
        compose("GRANT SELECT, INSERT ON {}.contests TO {}", ledger, who),
    ]


def written_columns(runs: RunsTable) -> list[str]:
    """The table's columns that a mark writes."""
    written = [runs.facts[role].name for role in WRITTEN if runs.has(role)]
    return [*written, *(column.name for column in runs.released)]
