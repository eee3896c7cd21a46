"""Alembic's entry point. Takes the connection that :mod:`orphan_recovery.migrate` holds open."""

from alembic import context
from sqlalchemy import text

from orphan_recovery.ledger import SCHEMA
from orphan_recovery.migrate import VERSION_TABLE

connection = context.config.attributes["connection"]

# Asked first, because CREATE SCHEMA IF NOT EXISTS needs a right that a later run may not have.
if not connection.scalar(text("SELECT to_regnamespace(:name)"), {"name": SCHEMA}):
    connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
connection.commit()

context.configure(
    connection=connection,
    version_table=VERSION_TABLE,
    version_table_schema=SCHEMA,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
