"""The ledger of sweeps and verdicts, and the function of the truth trigger."""

from alembic import op

revision = "ledger_0001"
down_revision = None
branch_labels = ("ledger",)

TRUTH = """
CREATE FUNCTION orphan_recovery.prevent_worker_run_mutation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    told    jsonb := TG_ARGV[0];  -- how this table calls its key and its status, and what it keeps
    before  jsonb := to_jsonb(OLD);
    after   jsonb;
    run     text;
    status  text := before->>(told->>'status');
    changed text;
BEGIN
    SELECT string_agg(before->>name, ', ') INTO run
    FROM jsonb_array_elements_text(told->'key') AS name;
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'TRUTH_VIOLATION: run % is %, and a terminal run is never deleted',
            run, status
            USING ERRCODE = 'P0001',
                  HINT = 'To retire old runs, see "Keeping the tables small" in the README.';
    END IF;
    after := to_jsonb(NEW);
    SELECT string_agg(name, ', ') INTO changed
    FROM jsonb_array_elements_text(told->'frozen') AS name
    WHERE before->name IS DISTINCT FROM after->name;
    IF changed IS NOT NULL THEN
        RAISE EXCEPTION 'TRUTH_VIOLATION: run % is %, and a terminal run never changes (%)',
            run, status, changed
            USING ERRCODE = 'P0001',
                  HINT = 'A retry is a new row that points to this one as its parent.';
    END IF;
    RETURN NULL;  -- is ignored: the row is written, or all is rolled back
END $$
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
    question   text,
    seen_by    uuid REFERENCES orphan_recovery.sweeps,
    opened_at  timestamptz NOT NULL,
    in_flight  bigint,
    undatable  bigint,
    ahead      bigint,
    exempt     bigint,
    timeline   text,
    looked_twice text,
    hold       uuid,
    ended_at   timestamptz,
    ended_as   text CHECK (ended_as IN ('completed', 'failed', 'held', 'died', 'direct')),
    detected   bigint,
    marked     bigint,
    missed     bigint,
    failed     bigint,
    error      text,
    CHECK ((ended_at IS NULL) = (ended_as IS NULL))
)
"""

# One row for each run that a sweep judged. The key begins with the run: the history of one run is
# looked up by it, and a sweep's own verdicts by an index that is small, since a sweep's entries
# in it are all alike. Its sweep is required by a trigger, which looks once a statement where a
# foreign key looks once a row. The two come to the same, for a sweep is deleted by nobody but the
# owner who retires it, after its verdicts.
VERDICTS = """
CREATE TABLE orphan_recovery.verdicts (
    sweep_id     uuid NOT NULL,
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
    PRIMARY KEY (run_id, sweep_id)
)
"""

# A run marked crashed whose worker reported a result later. The row stays as it is.
CONTESTS = """
CREATE TABLE orphan_recovery.contests (
    sweep_id        uuid NOT NULL REFERENCES orphan_recovery.sweeps,
    run_id          text NOT NULL,
    target          text NOT NULL,
    worker_id       text,
    reported_status text NOT NULL,
    reported_at     timestamptz NOT NULL,
    PRIMARY KEY (sweep_id, run_id)
)
"""

# A sweep that stopped because too much of the fleet looked dead, the runs it is about, and a
# person's release of them.
HOLDS = """
CREATE TABLE orphan_recovery.holds (
    hold_id   uuid PRIMARY KEY,
    target    text NOT NULL,
    sweep_id  uuid NOT NULL REFERENCES orphan_recovery.sweeps,
    opened_at timestamptz NOT NULL,
    evidence  jsonb NOT NULL,
    ended_at  timestamptz,
    ended_as  text CHECK (ended_as IN ('recovered', 'released')),
    ended_by  uuid REFERENCES orphan_recovery.sweeps,
    CHECK ((ended_at IS NULL) = (ended_as IS NULL))
)
"""
HOLD_RUNS = """
CREATE TABLE orphan_recovery.hold_runs (
    hold_id uuid NOT NULL REFERENCES orphan_recovery.holds,
    run_id  text NOT NULL,
    PRIMARY KEY (run_id, hold_id)
)
"""
APPROVALS = """
CREATE TABLE orphan_recovery.approvals (
    hold_id     uuid NOT NULL REFERENCES orphan_recovery.holds,
    approved_at timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL,
    approved_by text NOT NULL,
    note        text,
    PRIMARY KEY (hold_id, approved_at)
)
"""

LEDGER_INDEXES = (
    # The last sweep of a target.
    "CREATE INDEX sweeps_latest ON orphan_recovery.sweeps (target, opened_at DESC)",
    # Holds that are open: few, if any.
    "CREATE INDEX holds_open ON orphan_recovery.holds (target) WHERE ended_at IS NULL",
    # What one sweep did.
    "CREATE INDEX verdicts_sweep ON orphan_recovery.verdicts (sweep_id)",
    # The verdicts of late. They are appended, so that their time follows their place: the earliest
    # and the latest of each megabyte tell where to look, and next to nothing is written for it.
    "CREATE INDEX verdicts_judged ON orphan_recovery.verdicts USING brin (judged_at)",
    # Sweeps to be closed because they died.
    "CREATE INDEX sweeps_open ON orphan_recovery.sweeps (opened_at) WHERE ended_at IS NULL",
    # For the foreign key, when old sweeps are retired.
    "CREATE INDEX sweeps_seen_by ON orphan_recovery.sweeps (seen_by) WHERE seen_by IS NOT NULL",
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

# A sweep, and a hold, is written twice: when it opens, and when it is closed, once and with
# nothing but its end.
SWEEP_GUARD = """
CREATE FUNCTION orphan_recovery.allow_one_close() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ending text[] := ARRAY['ended_at', 'ended_as', 'ended_by', 'detected', 'marked', 'missed',
                           'failed', 'looked_twice', 'hold', 'error'];
    key    text   := TG_ARGV[0];
BEGIN
    IF OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL
       AND to_jsonb(OLD) - ending = to_jsonb(NEW) - ending THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'LEDGER_VIOLATION: % of %.% may be closed once, and is not to be changed',
        to_jsonb(OLD)->>key, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'P0001';
END $$
"""

SWEEP_REQUIRED = """
CREATE FUNCTION orphan_recovery.require_sweep() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    missing uuid;
BEGIN
    -- Verdicts of one sweep, as nearly always, are told by comparing each with the first.
    SELECT sweep_id INTO missing FROM added LIMIT 1;
    IF NOT EXISTS (SELECT FROM added WHERE sweep_id <> missing)
       AND EXISTS (SELECT FROM orphan_recovery.sweeps AS s WHERE s.sweep_id = missing) THEN
        RETURN NULL;
    END IF;
    SELECT told.sweep_id INTO missing FROM (SELECT DISTINCT sweep_id FROM added) AS told
    WHERE NOT EXISTS (SELECT FROM orphan_recovery.sweeps AS s WHERE s.sweep_id = told.sweep_id);
    IF FOUND THEN
        RAISE EXCEPTION 'LEDGER_VIOLATION: a verdict of sweep %, which is not in the ledger', missing
            USING ERRCODE = '23503';
    END IF;
    RETURN NULL;
END $$
"""

APPEND_ONLY = ("verdicts", "contests", "hold_runs", "approvals")
CLOSED_ONCE = {"sweeps": "sweep_id", "holds": "hold_id"}


def ledger_triggers() -> list[str]:
    refuse = "EXECUTE FUNCTION orphan_recovery.refuse_ledger_change()"
    triggers = []
    for table in (*APPEND_ONLY, *CLOSED_ONCE):
        changes = "UPDATE OR DELETE" if table in APPEND_ONLY else "DELETE"
        triggers += [
            f"CREATE TRIGGER append_only BEFORE {changes} ON orphan_recovery.{table} "
            f"FOR EACH ROW {refuse}",
            f"CREATE TRIGGER no_truncate BEFORE TRUNCATE ON orphan_recovery.{table} "
            f"FOR EACH STATEMENT {refuse}",
        ]
    triggers += [
        "CREATE TRIGGER require_sweep AFTER INSERT ON orphan_recovery.verdicts "
        "REFERENCING NEW TABLE AS added "
        "FOR EACH STATEMENT EXECUTE FUNCTION orphan_recovery.require_sweep()"
    ]
    return triggers + [
        f"CREATE TRIGGER one_close BEFORE UPDATE ON orphan_recovery.{table} "
        f"FOR EACH ROW EXECUTE FUNCTION orphan_recovery.allow_one_close('{key}')"
        for table, key in CLOSED_ONCE.items()
    ]


def upgrade() -> None:
    op.execute(TRUTH)
    op.execute(SWEEPS)
    op.execute(VERDICTS)
    for statement in (CONTESTS, HOLDS, HOLD_RUNS, APPROVALS, *LEDGER_INDEXES):
        op.execute(statement)
    for statement in (LEDGER_GUARD, SWEEP_GUARD, SWEEP_REQUIRED, *ledger_triggers()):
        op.execute(statement)


def downgrade() -> None:
    for table in ("approvals", "hold_runs", "holds", "contests", "verdicts", "sweeps"):
        op.execute(f"DROP TABLE orphan_recovery.{table}")
    op.execute("DROP FUNCTION orphan_recovery.refuse_ledger_change()")
    op.execute("DROP FUNCTION orphan_recovery.allow_one_close()")
    op.execute("DROP FUNCTION orphan_recovery.require_sweep()")
    op.execute("DROP FUNCTION orphan_recovery.prevent_worker_run_mutation()")
