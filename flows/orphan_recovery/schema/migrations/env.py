"""Alembic's entry point. Takes the connection that ``migrate.py`` holds open.

Without one it writes the statements down instead, for a person to read.
"""

from typing import Any

from alembic import context
from sqlalchemy import text

from orphan_recovery.ledger import SCHEMA
from orphan_recovery.schema.migrate import VERSION_TABLE

options: dict[str, Any] = {"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}

if context.is_offline_mode():
    # A paramstyle without percent signs: else each of them would be written twice.
    named = {"paramstyle": "named"}
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts=named, **options)
else:
    connection = context.config.attributes["connection"]
    # Asked first, as CREATE SCHEMA IF NOT EXISTS needs a right that a later run may not have.
    if not connection.scalar(text("SELECT to_regnamespace(:name)"), {"name": SCHEMA}):
        connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
    connection.commit()
    context.configure(connection=connection, transaction_per_migration=True, **options)

with context.begin_transaction():
    context.run_migrations()
