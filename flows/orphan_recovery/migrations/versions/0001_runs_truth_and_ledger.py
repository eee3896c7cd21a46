"""The runs table, the truth trigger, the ledger.

An existing worker_runs table is adopted: columns it lacks are added (none of which rewrites the
table), and nothing else about it changes.
"""

import sqlalchemy as sa
from alembic import op

from orphan_recovery.settings import ConfigurationError

revision = "0001"
down_revision = None

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

TRUTH = """
CREATE OR REPLACE FUNCTION orphan_recovery.prevent_worker_run_mutation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before jsonb := to_jsonb(OLD);
    after  jsonb;
    changed text;
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'TRUTH_VIOLATION: run % is %, and a terminal run is never deleted',
            before->>'id', before->>'status'
            USING ERRCODE = 'P0001',
                  HINT = 'To retire old runs, see "Keeping the tables small" in the README.';
    END IF;
    after := to_jsonb(NEW);
    SELECT string_agg(name, ', ') INTO changed
    FROM unnest(ARRAY['id', 'status', 'success', 'error', 'output_json', 'started_at',
                      'completed_at', 'worker_id', 'tenant_id']) AS name
    WHERE before->name IS DISTINCT FROM after->name;
    IF changed IS NOT NULL THEN
        RAISE EXCEPTION 'TRUTH_VIOLATION: run % is %, and a terminal run never changes (%)',
            before->>'id', before->>'status', changed
            USING ERRCODE = 'P0001',
                  HINT = 'A retry is a new row whose parent_run_id points to this one.';
    END IF;
    RETURN NEW;
END $$
"""

# status::text, because it may be an enum.
TRUTH_TRIGGER = """
CREATE TRIGGER prevent_worker_run_mutation
BEFORE UPDATE OR DELETE ON worker_runs
FOR EACH ROW WHEN (OLD.status::text IN ('completed', 'failed', 'crashed'))
EXECUTE FUNCTION orphan_recovery.prevent_worker_run_mutation()
"""

SWEEPS = """
CREATE TABLE orphan_recovery.sweeps (
    sweep_id   uuid PRIMARY KEY,
    target     text NOT NULL,
    table_name text NOT NULL,
    asked_by   text NOT NULL,
    reason     text NOT NULL,
    threshold  interval NOT NULL,
    scope      jsonb NOT NULL,
    version    text NOT NULL,
    opened_at  timestamptz NOT NULL,
    in_flight  bigint,
    undatable  bigint,
    ahead      bigint,
    ended_at   timestamptz,
    ended_as   text CHECK (ended_as IN ('completed', 'failed', 'died', 'direct')),
    detected   bigint,
    marked     bigint,
    missed     bigint,
    failed     bigint,
    error      text,
    CHECK ((ended_at IS NULL) = (ended_as IS NULL))
)
"""

VERDICTS = """
CREATE TABLE orphan_recovery.verdicts (
    sweep_id     uuid NOT NULL REFERENCES orphan_recovery.sweeps,
    run_id       text NOT NULL,
    target       text NOT NULL,
    outcome      text NOT NULL CHECK (outcome IN (
                     'marked', 'already_marked', 'finished_first', 'sign_of_life',
                     'changed_hands', 'vanished', 'failed')),
    worker_id    text,
    tenant_id    text,
    task         text,
    status_seen  text NOT NULL,
    sign_of_life timestamptz NOT NULL,
    evidence     text NOT NULL,
    silence      interval NOT NULL,
    threshold    interval NOT NULL,
    rule         text NOT NULL,
    reason       text NOT NULL,
    judged_at    timestamptz NOT NULL,
    found        jsonb,
    error        text,
    PRIMARY KEY (sweep_id, run_id)
)
"""

LEDGER_INDEXES = (
    # The history of one run, and whether another sweep marked it.
    "CREATE INDEX verdicts_run ON orphan_recovery.verdicts (target, run_id)",
    # Sweeps to be closed because they died.
    "CREATE INDEX sweeps_open ON orphan_recovery.sweeps (opened_at) WHERE ended_at IS NULL",
)

LEDGER_GUARD = """
CREATE FUNCTION orphan_recovery.refuse_ledger_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'LEDGER_VIOLATION: % on %.% is refused, the ledger is append-only',
        TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'P0001';
END $$
"""

# A sweep is written twice: when it opens, and when it is closed, once and with nothing but its
# end.
SWEEP_GUARD = """
CREATE FUNCTION orphan_recovery.allow_one_close() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ending text[] := ARRAY['ended_at', 'ended_as', 'detected', 'marked', 'missed', 'failed',
                           'error'];
BEGIN
    IF OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL
       AND to_jsonb(OLD) - ending = to_jsonb(NEW) - ending THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'LEDGER_VIOLATION: sweep % may be closed once, and is not to be changed',
        OLD.sweep_id
        USING ERRCODE = 'P0001';
END $$
"""

LEDGER_TRIGGERS = (
    "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON orphan_recovery.verdicts "
    "FOR EACH ROW EXECUTE FUNCTION orphan_recovery.refuse_ledger_change()",
    "CREATE TRIGGER no_truncate BEFORE TRUNCATE ON orphan_recovery.verdicts "
    "FOR EACH STATEMENT EXECUTE FUNCTION orphan_recovery.refuse_ledger_change()",
    "CREATE TRIGGER append_only BEFORE DELETE ON orphan_recovery.sweeps "
    "FOR EACH ROW EXECUTE FUNCTION orphan_recovery.refuse_ledger_change()",
    "CREATE TRIGGER one_close BEFORE UPDATE ON orphan_recovery.sweeps "
    "FOR EACH ROW EXECUTE FUNCTION orphan_recovery.allow_one_close()",
    "CREATE TRIGGER no_truncate BEFORE TRUNCATE ON orphan_recovery.sweeps "
    "FOR EACH STATEMENT EXECUTE FUNCTION orphan_recovery.refuse_ledger_change()",
)


def upgrade() -> None:
    if op.get_bind().scalar(sa.text("SELECT to_regclass('worker_runs')")) is None:
        op.execute(RUNS)
        op.execute(f"COMMENT ON TABLE worker_runs IS '{CREATED_HERE}'")
    else:
        adopt()
    op.execute(TRUTH)
    op.execute(TRUTH_TRIGGER)
    op.execute(SWEEPS)
    op.execute(VERDICTS)
    for statement in (*LEDGER_INDEXES, LEDGER_GUARD, SWEEP_GUARD, *LEDGER_TRIGGERS):
        op.execute(statement)


def adopt() -> None:
    bind = op.get_bind()
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
    check_status(dict((name, oid) for name, _, oid in columns)["status"], types["status"])
    lacking = [name for name in ADDITIONS if name not in types]
    if lacking:  # one statement, so the lock is taken once
        added = ", ".join(
            f"ADD COLUMN {name} {ADDITIONS[name].format(key=types['id'])}" for name in lacking
        )
        op.execute(f"ALTER TABLE worker_runs {added}")
    if "created_at" in lacking:
        op.execute("ALTER TABLE worker_runs ALTER COLUMN created_at SET DEFAULT now()")


def check_status(type_oid: int, type_name: str) -> None:
    """An enum must know every status that recovery reads or writes."""
    labels = op.get_bind().scalars(
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
    if bind.scalar(sa.text("SELECT EXISTS (SELECT FROM orphan_recovery.sweeps)")):
        raise ConfigurationError(
            "the ledger holds sweeps, which a downgrade would destroy: keep a copy, then drop "
            "the schema yourself with DROP SCHEMA orphan_recovery CASCADE"
        )
    op.execute("DROP TRIGGER prevent_worker_run_mutation ON worker_runs")
    op.execute("DROP FUNCTION orphan_recovery.prevent_worker_run_mutation()")
    op.execute("DROP TABLE orphan_recovery.verdicts, orphan_recovery.sweeps")
    op.execute("DROP FUNCTION orphan_recovery.refuse_ledger_change()")
    op.execute("DROP FUNCTION orphan_recovery.allow_one_close()")
    comment = "SELECT obj_description('worker_runs'::regclass, 'pg_class')"
    empty = "SELECT NOT EXISTS (SELECT FROM worker_runs)"
    if bind.scalar(sa.text(comment)) == CREATED_HERE and bind.scalar(sa.text(empty)):
        op.execute("DROP TABLE worker_runs")
