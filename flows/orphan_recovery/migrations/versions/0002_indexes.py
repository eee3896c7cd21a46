"""The two indexes that recovery reads by, built without keeping anyone from writing."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

INDEXES = {
    # Detection. Only rows in flight are in it, so it stays small however large the table grows;
    # and no column that a heartbeat writes, so that beats stay heap-only updates.
    "worker_runs_in_flight": "(created_at, id) WHERE status IN ('queued', 'running')",
    # The summary's newest ten.
    "worker_runs_crashed": "(completed_at DESC NULLS LAST, id) WHERE status = 'crashed'",
}

IS_VALID = """
SELECT indisvalid FROM pg_index
WHERE indexrelid = to_regclass(:name) AND indrelid = 'worker_runs'::regclass
"""


def upgrade() -> None:
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        # A concurrent build waits for the transactions that are open when it starts. It holds
        # nobody up meanwhile, so it may wait longer than a lock.
        bind.execute(sa.text("SET lock_timeout = '60s'"))
        for name, definition in INDEXES.items():
            if bind.scalar(sa.text(IS_VALID), {"name": name}) is False:  # an interrupted build
                op.execute(f"DROP INDEX CONCURRENTLY {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON worker_runs {definition}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name in INDEXES:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
