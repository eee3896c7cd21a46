"""The schema: what `migrate` makes of a database, and what `sql` shows a DBA beforehand."""
