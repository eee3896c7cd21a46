"""The default table: created, or adopted where it is there already.

An existing worker_runs table is adopted: columns it lacks are added (none of which rewrites the
table), and nothing else about it changes. Its indexes and its trigger are made as for any other
table: see :mod:`orphan_recovery.schema.ddl`.
"""

import sqlalchemy as sa
from alembic import op

from orphan_recovery.settings import ConfigurationError

revision = "runs_0001"
down_revision = None
branch_labels = ("runs",)

CREATED_HERE = "Created by orphan-recovery."

RUNS = """
CREATE TABLE worker_runs (
    id            text PRIMARY KEY DEFAULT gen_random_uuid()::text,
    tenant_id     text,
    worker_id     text,
    task          text,
    input_json    jsonb,
    status        text NOT NULL DEFAULT 'queued'
                  CHECK (status IN ('queued', 'running', 'completed', 'failed', 'crashed')),
    success       boolean,
    error         text,
    output_json   jsonb,
    created_at    timestamptz NOT NULL DEFAULT now(),
    started_at    timestamptz,
    heartbeat_at  timestamptz,
    completed_at  timestamptz,
    parent_run_id text,
    attempt       integer NOT NULL DEFAULT 1,
    is_retry      boolean NOT NULL DEFAULT false
)
"""

# In this order; {key} is the type of the table's own id. A constant default is kept in the
# catalogue and rewrites no row; created_at gets its default afterwards, for new rows only,
# because a time that was never recorded is not to be made up.
ADDITIONS = {
    "tenant_id": "text",
    "worker_id": "text",
    "task": "text",
    "input_json": "jsonb",
    "success": "boolean",
    "error": "text",
    "output_json": "jsonb",
    "created_at": "timestamptz",
    "started_at": "timestamptz",
    "heartbeat_at": "timestamptz",
    "completed_at": "timestamptz",
    "parent_run_id": "{key}",
    "attempt": "integer DEFAULT 1",
    "is_retry": "boolean DEFAULT false",
}

UNIQUE_ID = """
SELECT EXISTS (
    SELECT FROM pg_index i
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attname = 'id'
    WHERE i.indrelid = 'worker_runs'::regclass AND i.indisunique AND i.indisvalid
      AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum AND a.attnotnull
      AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = i.indrelid
                      AND k.contype = 'n' AND k.conkey[1] = a.attnum AND NOT k.convalidated)
)
"""


def upgrade() -> None:
    bind = op.get_bind()
    there = bind.scalar(sa.text("SELECT to_regclass('worker_runs')")) is not None
    for statement in statements(adopted_types(bind) if there else None):
        op.execute(statement)


def statements(types: "dict[str, str] | None") -> list[str]:
    """What creates the table; or what completes one that has columns of these types."""
    if types is None:
        return [RUNS, f"COMMENT ON TABLE worker_runs IS '{CREATED_HERE}'"]
    lacking = [name for name in ADDITIONS if name not in types]
    if not lacking:
        return []
    added = ", ".join(
        f"ADD COLUMN {name} {ADDITIONS[name].format(key=types['id'])}" for name in lacking
    )
    completing = [f"ALTER TABLE worker_runs {added}"]  # one statement, so the lock is taken once
    if "created_at" in lacking:
        completing.append("ALTER TABLE worker_runs ALTER COLUMN created_at SET DEFAULT now()")
    return completing


def adopted_types(bind: sa.Connection) -> dict[str, str]:
    """The columns of the table that is there, with their types, or a refusal to adopt it."""
    kind = bind.scalar(sa.text("SELECT relkind FROM pg_class WHERE oid = 'worker_runs'::regclass"))
    if kind not in ("r", b"r"):
        raise ConfigurationError(
            f"worker_runs is not an ordinary table (pg_class.relkind is {kind!r}): views and "
            "partitioned tables cannot be adopted"
        )
    columns = bind.execute(
        sa.text(
            "SELECT attname, format_type(atttypid, atttypmod), atttypid FROM pg_attribute "
            "WHERE attrelid = 'worker_runs'::regclass AND attnum > 0 AND NOT attisdropped"
        )
    ).all()
    types = {name: kind for name, kind, _ in columns}
    if absent := [name for name in ("id", "status") if name not in types]:
        raise ConfigurationError(
            f"the worker_runs table that is there has no column {' and no column '.join(absent)}: "
            "it cannot be adopted; rename its columns, or give recovery a table of its own"
        )
    if not bind.scalar(sa.text(UNIQUE_ID)):
        raise ConfigurationError(
            "the id of the worker_runs table that is there is not unique, or may be NULL, so that "
            "one mark could hit several rows: ALTER TABLE worker_runs ADD PRIMARY KEY (id), and migrate again"
        )
    check_status(bind, dict((name, oid) for name, _, oid in columns)["status"], types["status"])
    return types


def check_status(bind: sa.Connection, type_oid: int, type_name: str) -> None:
    """An enum must know every status that recovery reads or writes."""
    labels = bind.scalars(
        sa.text("SELECT enumlabel FROM pg_enum WHERE enumtypid = :oid"), {"oid": type_oid}
    )
    known = set(labels)
    missing = [s for s in ("queued", "running", "crashed") if known and s not in known]
    if missing:
        cure = "; ".join(f"ALTER TYPE {type_name} ADD VALUE '{status}'" for status in missing)
        raise ConfigurationError(
            f"the status column of worker_runs is the enum {type_name}, which has no "
            f"{', '.join(map(repr, missing))}: run {cure}; and migrate again"
        )


def downgrade() -> None:
    bind = op.get_bind()
    comment = "SELECT obj_description('worker_runs'::regclass, 'pg_class')"
    empty = "SELECT NOT EXISTS (SELECT FROM worker_runs)"
    if bind.scalar(sa.text(comment)) == CREATED_HERE and bind.scalar(sa.text(empty)):
        op.execute("DROP TABLE worker_runs")
