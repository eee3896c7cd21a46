"""What the database itself says of a table: its kind, its columns and their types, its keys.

The hazard is a guess: a naive time taken for an aware one, a key that is not unique, a name that
only looks like the one that was meant. Nothing here is guessed, and no name that a person wrote
becomes SQL: it goes to the server as a value, and what comes back is the catalogue's own.
"""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import UserDefinedType

from orphan_recovery.policy import is_outage, is_transient, sqlstate


class CatalogType(UserDefinedType[Any]):
    """A type of the database's, by the name that the server quoted. Values travel as text."""

    cache_ok = True
    render_bind_cast = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name.replace("%", "%%")  # the driver reads a single one as a placeholder


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """One column, as the catalogue has it."""

    name: str
    declared: str
    """The type as people write it, such as ``character varying(20)``."""
    cast_name: str
    """The type, qualified and quoted, without its length."""
    kind: str
    """The type below all domains, such as ``timestamptz``, ``text``, ``int4``."""
    category: str
    """The server's own letter for its family: S text, D time, B boolean, N number, E enum."""
    length: int | None
    """Characters that fit, for a text that is bounded."""
    labels: tuple[str, ...]
    """An enum's values; empty for every other type."""
    is_domain: bool
    is_generated: bool
    schema: str = "pg_catalog"
    """Where the type is, for which a role needs USAGE to name it."""
    is_nullable: bool = True
    """Whether a row may have NULL there: one of before may, where NOT NULL is NOT VALID."""
    refuses_null: bool = False
    """Whether NULL cannot be written to it."""

    @property
    def is_time(self) -> bool:
        return self.kind in ("timestamptz", "timestamp")

    @property
    def is_text(self) -> bool:
        return self.category == "S"

    @property
    def type(self) -> CatalogType:
        return CatalogType(self.cast_name)


@dataclass(frozen=True, slots=True)
class Relation:
    """One table, as the catalogue has it."""

    oid: int
    schema: str
    name: str
    kind: str
    """``pg_class.relkind``: r a table, p a partitioned one, v a view, …"""
    columns: dict[str, ColumnFacts]
    unique: tuple[frozenset[str], ...]
    """Each set of columns that is unique together and never NULL, by a whole and valid index."""
    checks: dict[str, tuple[str, ...]]
    """Column to the conditions that the table puts on it alone."""
    shows_places: bool
    """Whether a row can be told by its place, ``ctid``: the table is one heap without parts or
    children, and this role may read it."""
    hides_rows: bool = False
    """Whether row security may keep rows from this role: it is active, and no policy shows all."""
    stamp: str = ""
    """Another one once the table, or a column of it, is not as it was."""

    @property
    def is_table(self) -> bool:
        return self.kind in ("r", "p")

    @property
    def what(self) -> str:
        """The kind of relation, for people."""
        return _KINDS.get(self.kind, f"relation of kind {self.kind!r}")


_KINDS: Final = {
    "r": "table",
    "p": "partitioned table",
    "v": "view",
    "m": "materialized view",
    "f": "foreign table",
    "S": "sequence",
    "i": "index",
    "c": "composite type",
}

_STAMP: Final = """
    concat_ws(' ', c.oid, c.xmin, (SELECT sum(a.xmin::text::bigint) FROM pg_attribute AS a
                                   WHERE a.attrelid = c.oid AND a.attnum > 0))
"""
_NAMED: Final = """
    to_regclass(CASE WHEN CAST(:schema AS text) IS NULL THEN format('%I', CAST(:name AS text))
                     ELSE format('%I.%I', CAST(:schema AS text), CAST(:name AS text)) END)
"""
_STAMPED: Final = text(f"SELECT {_STAMP} FROM pg_class AS c WHERE c.oid = {_NAMED}")  # noqa: S608


def _shows_all(table: str, who: str) -> str:
    """Whether row security's policies, where it is active, show a role every row all the same."""
    return f"""(
        SELECT coalesce(bool_or(p.polpermissive AND p.shows_all), false)
               AND coalesce(bool_and(p.shows_all OR p.polpermissive), true)
        FROM (SELECT polpermissive, pg_get_expr(polqual, polrelid) = 'true' AS shows_all
              FROM pg_policy
              WHERE polrelid = {table} AND polcmd IN ('r', '*') AND EXISTS (
                  SELECT FROM unnest(polroles) AS member (role)
                  WHERE role = 0 OR pg_has_role({who}, role, 'USAGE'))) AS p)"""  # noqa: S608


_HIDES_BELOW: Final = text(
    f"""
    WITH RECURSIVE me AS (SELECT oid FROM pg_roles WHERE rolname = current_user),
    -- Who is asked for what is below: by a view its owner, with security_invoker whoever reads.
    below AS (
        SELECT CAST(:view AS oid) AS oid, me.oid AS who FROM me
        UNION
        SELECT d.refobjid, CASE WHEN (SELECT option_value::boolean
                                      FROM pg_options_to_table(v.reloptions)
                                      WHERE option_name = 'security_invoker')
                                THEN me.oid ELSE v.relowner END
        FROM me, below JOIN pg_class v ON v.oid = below.oid AND v.relkind = 'v'
        JOIN pg_rewrite r ON r.ev_class = v.oid AND r.ev_type = '1'  -- SELECT
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
    )
    SELECT bool_or(t.relrowsecurity AND NOT (role.rolsuper OR role.rolbypassrls)
                   AND (t.relforcerowsecurity OR NOT pg_has_role(who, t.relowner, 'USAGE'))
                   AND NOT {_shows_all("t.oid", "who")})
    FROM below JOIN pg_class t ON t.oid = below.oid JOIN pg_roles role ON role.oid = who
    """  # noqa: S608 - of constants
)
_RELATION: Final = text(
    f"""
    SELECT c.oid, n.nspname, c.relname, c.relkind::text AS kind,
           -- A heap has one ctid a row (column -1); a table with children, one a row in each.
           NOT c.relhassubclass AND c.relam = (SELECT oid FROM pg_am WHERE amname = 'heap')
               AND has_column_privilege(c.oid, (-1)::smallint, 'SELECT') AS shows_places,
           row_security_active(c.oid) AND NOT {_shows_all("c.oid", "current_user")} AS hides_rows,
           {_STAMP} AS stamp,
           (SELECT coalesce(jsonb_agg(
                       jsonb_build_array(a.attname, pg_get_expr(k.conbin, k.conrelid))
                       ORDER BY k.conname), '[]')
            FROM pg_constraint k
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.conkey[1]
            WHERE k.conrelid = c.oid AND k.contype = 'c' AND cardinality(k.conkey) = 1
              -- Before Postgres 18 there is no such column, and each is enforced.
              AND to_jsonb(k)->>'conenforced' IS DISTINCT FROM 'false') AS checks,
           (SELECT coalesce(jsonb_agg(
                       (SELECT jsonb_agg(a.attname) FROM pg_attribute a
                        WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
                   ), '[]')
            FROM pg_index i
            WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
              AND i.indexprs IS NULL AND NOT EXISTS (
                  SELECT FROM pg_attribute a WHERE a.attrelid = c.oid
                  AND (NOT a.attnotnull OR a.attnum = ANY (unsure.attnums))
                  AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))) AS unique_sets,
           (WITH RECURSIVE layer AS (
                SELECT a.attnum, a.attname, a.attgenerated, a.attnotnull, a.atttypmod AS typmod,
                       0 AS depth, format_type(a.atttypid, a.atttypmod) AS declared,
                       format('%I.%I', s.nspname, t.typname) AS cast_name, s.nspname AS schema,
                       t.oid AS type_oid, t.typname, t.typtype, t.typbasetype, t.typtypmod,
                       t.typcategory
                FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                JOIN pg_namespace s ON s.oid = t.typnamespace
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                UNION ALL
                SELECT l.attnum, l.attname, l.attgenerated, l.attnotnull, l.typtypmod,
                       l.depth + 1, l.declared, l.cast_name, l.schema, t.oid, t.typname, t.typtype,
                       t.typbasetype, t.typtypmod, t.typcategory
                FROM layer l JOIN pg_type t ON t.oid = l.typbasetype
                WHERE l.typtype = 'd'
            )
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                'name', attname, 'declared', declared, 'cast_name', cast_name,
                'schema', schema, 'kind', typname,
                'category', typcategory, 'is_domain', depth > 0, 'is_generated', attgenerated <> '',
                'is_nullable', NOT attnotnull OR attnum = ANY (unsure.attnums),
                'refuses_null', attnotnull,
                'length', CASE WHEN typname IN ('varchar', 'bpchar') AND typmod > 4
                               THEN typmod - 4 END,
                'labels', ARRAY(SELECT e.enumlabel FROM pg_enum e WHERE e.enumtypid = type_oid
                                ORDER BY e.enumsortorder)) ORDER BY attnum), '[]')
            FROM layer WHERE typtype <> 'd') AS columns
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    -- NOT NULL only for rows to come (NOT VALID), or not for those of child tables.
    CROSS JOIN LATERAL (SELECT ARRAY(
        SELECT k.conkey[1] FROM pg_constraint k
        WHERE k.conrelid = c.oid AND k.contype = 'n'
          AND (NOT k.convalidated OR k.connoinherit AND c.relhassubclass))) AS unsure (attnums)
    WHERE c.oid = {_NAMED}
    """  # noqa: S608 - of constants
)


def look_up(connection: Connection, schema: str | None, name: str) -> Relation | None:
    """The relation of that name, on the search path where no schema is given. Reads only.

    Returns:
        What the catalogue says of it; None if there is none.
    """
    found = connection.execute(_RELATION, {"schema": schema, "name": name}).mappings().one_or_none()
    if found is None:
        return None
    hides_rows: bool = found["hides_rows"]
    if found["kind"] == "v":  # it has no row security of its own, and what is below it may
        hides_rows = connection.scalar(_HIDES_BELOW, {"view": found["oid"]})
    checks: dict[str, tuple[str, ...]] = {}
    for column, condition in found["checks"]:
        checks[column] = (*checks.get(column, ()), condition)
    return Relation(
        oid=found["oid"],
        schema=found["nspname"],
        name=found["relname"],
        kind=found["kind"],
        columns={
            column["name"]: ColumnFacts(**{**column, "labels": tuple(column["labels"])})
            for column in found["columns"]
        },
        unique=tuple(frozenset(columns) for columns in found["unique_sets"] if columns),
        checks=checks,
        shows_places=found["shows_places"],
        hides_rows=hides_rows,
        stamp=found["stamp"],
    )


def stamp_of(connection: Connection, schema: str | None, name: str) -> str | None:
    """The stamp of the relation of that name, as it is now; None if there is none. Reads only."""
    found: str | None = connection.scalar(_STAMPED, {"schema": schema, "name": name})
    return found


def similar(connection: Connection, name: str) -> list[str]:
    """Tables of other schemas, or of another case, that may have been meant. Reads only."""
    statement = text(
        "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE lower(c.relname) = lower(:name) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
        " ORDER BY 1 LIMIT 5"
    )
    return list(connection.scalars(statement, {"name": name}))


_NO_RIGHT: Final = "42501"


def accepts(
    connection: Connection, relation: Relation, column: str, value: str, *, written: bool
) -> str | None:
    """Whether ``column`` can hold ``value``, by its type and by the table's own conditions.

    Returns:
        None if it can, else why not. Where the type itself refuses the value, such as a domain,
        the transaction is to be rolled back.

    Raises:
        sqlalchemy.exc.DBAPIError: what says nothing of the value: a connection that is lost, a
            lock that is not to be had, a right that is missing.
    """
    facts = relation.columns[column]
    if facts.labels and value not in facts.labels:
        return f"the enum {facts.declared} has {', '.join(map(repr, facts.labels))}"
    if facts.length is not None and len(value) > facts.length:
        return f"it is {facts.declared}"
    conditions = relation.checks.get(column, ()) if written else ()
    if facts.is_text and not facts.is_domain and not conditions:
        return None  # any text will do
    # The conditions are the catalogue's own text; the value stays a value.
    held = " AND ".join(f"coalesce({condition}, true)" for condition in conditions) or "true"
    name = '"' + column.replace('"', '""') + '"'
    one = f"SELECT CAST(<value> AS {facts.cast_name}) AS {name}"
    probe = f"SELECT {held} FROM ({one}) AS probe"  # noqa: S608 - own text
    statement = text(probe.replace(":", r"\:").replace("<value>", ":value", 1))
    try:
        if connection.scalar(statement, {"value": value}):
            return None
    except DBAPIError as error:
        if is_transient(error) or is_outage(error) or sqlstate(error) == _NO_RIGHT:
            raise
        # The type itself refuses it: a domain, a number.
        message = " ".join(str(error.orig).partition("CONTEXT")[0].split())
        return f"it is {facts.declared} ({message})"
    return f"the table has the condition {' and '.join(conditions)}"
