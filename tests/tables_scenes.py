"""Seven runs tables as real systems have them: what they are made of, and who in them is dead."""

from orphan_recovery.target import Columns, Target
from tables_support import Scene

# Rails: bigint keys, an integer for each status, naive times in UTC.
RAILS = Scene(
    ddl="""
    CREATE TABLE background_jobs (
        id bigserial PRIMARY KEY,
        job_class varchar NOT NULL,
        status integer NOT NULL DEFAULT 0 CHECK (status BETWEEN 0 AND 3),
        locked_by varchar,
        locked_at timestamp(6),
        last_error text,
        created_at timestamp(6) NOT NULL,
        updated_at timestamp(6) NOT NULL
    )""",
    runs="""
    INSERT INTO background_jobs (status, job_class, locked_by, created_at, locked_at, updated_at)
    SELECT s, 'ReportJob', by, t - created::interval, t - locked::interval, t - beat::interval
    FROM (SELECT timezone('UTC', now()) AS t) AS utc, (VALUES
        (1, 'host-1', '3 hours', '2 hours', '2 hours'),
        (1, 'host-1', '3 hours', '2 hours', '1 minute'),
        (1, 'host-2', '3 hours', '2 hours', '40 minutes'),
        (1, 'host-2', '2 minutes', '1 minute', '1 minute'),
        (0, NULL, '9 days', NULL, '9 days'),
        (2, 'host-1', '9 days', '9 days', '9 days'),
        (3, 'host-1', '9 days', '9 days', '9 days')
    ) AS v (s, by, created, locked, beat)""",
    table="background_jobs",
    setting="timezone = 'Asia/Tokyo'",
    toml="""
    [targets.scene]
    table = "background_jobs"
    heartbeat_seconds = 0.1
    in_flight = [1]
    waiting = [0]
    terminal = [2, 3]
    crashed = 3

    [targets.scene.columns]
    task = "job_class"
    worker_id = "locked_by"
    started_at = "locked_at"
    heartbeat_at = "updated_at"
    error = "last_error"
    """,
    orphans={"1": "run heartbeat", "3": "run heartbeat"},
)

# Django: uuid keys, a checked text, errors as JSON.
DJANGO = Scene(
    ddl="""
    CREATE TABLE tasks_taskresult (
        id uuid PRIMARY KEY,
        status varchar(12) NOT NULL CONSTRAINT tasks_status
            CHECK (status IN ('PENDING', 'STARTED', 'RETRY', 'SUCCESS', 'FAILURE', 'LOST')),
        task_name varchar(255),
        worker varchar(100),
        traceback jsonb,
        created timestamptz NOT NULL,
        date_started timestamptz,
        date_done timestamptz
    )""",
    runs="""
    INSERT INTO tasks_taskresult (id, status, worker, created, date_started, date_done)
    SELECT id::uuid, s, by, now() - made::interval, now() - begun::interval, now() - done::interval
    FROM (VALUES
        ('00000000-0000-0000-0000-00000000000a', 'STARTED', 'w1', '2 hours', '1 hour', NULL),
        ('00000000-0000-0000-0000-00000000000b', 'RETRY', NULL, '2 hours', NULL, NULL),
        ('00000000-0000-0000-0000-00000000000c', 'STARTED', 'w1', '2 hours', '2 minutes', NULL),
        ('00000000-0000-0000-0000-00000000000d', 'PENDING', NULL, '9 days', NULL, NULL),
        ('00000000-0000-0000-0000-00000000000e', 'SUCCESS', 'w1', '9 days', '9 days', '8 days'),
        ('00000000-0000-0000-0000-00000000000f', 'FAILURE', 'w1', '9 days', '9 days', '8 days')
    ) AS v (id, s, by, made, begun, done)""",
    table="tasks_taskresult",
    target=Target(
        name="django",
        table="public.tasks_taskresult",
        in_flight=("STARTED", "RETRY"),
        waiting=("PENDING",),
        terminal=("SUCCESS", "FAILURE", "LOST"),
        crashed="LOST",
        columns=Columns(
            task="task_name",
            worker_id="worker",
            error="traceback",
            created_at="created",
            started_at="date_started",
            completed_at="date_done",
        ),
    ),
    orphans={
        "00000000-0000-0000-0000-00000000000a": "age",
        "00000000-0000-0000-0000-00000000000b": "age",
    },
)

# Prisma: mixed case, reserved words, an enum of another schema, naive milliseconds beside zones.
PRISMA = Scene(
    ddl="""
    CREATE SCHEMA "app.""v2"" beta";
    CREATE SCHEMA "Types";
    CREATE TYPE "Types"."JobStatus" AS ENUM ('WAITING', 'ACTIVE', 'DONE', 'FAILED', 'Crashed!');
    CREATE TABLE "app.""v2"" beta"."Job" (
        "id" text PRIMARY KEY,
        "order" bigint,
        "user" text,
        "select" "Types"."JobStatus" NOT NULL DEFAULT 'WAITING',
        "group" text,
        "createdAt" timestamp(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
        "startedAt" timestamptz,
        "finishedAt" timestamp(3),
        "errorMessage" varchar(80)
    )""",
    runs="""
    INSERT INTO "app.""v2"" beta"."Job"
        ("id", "order", "user", "select", "group", "createdAt", "startedAt")
    SELECT id, 7, 'anna', s::"Types"."JobStatus", 'it''s w:1',
           timezone('UTC', now() - made::interval), now() - begun::interval
    FROM (VALUES
        ('cl%d "1"', 'ACTIVE', '2 hours', '1 hour'),
        ('cl:two', 'ACTIVE', '2 hours', NULL),
        ('cl(3)', 'ACTIVE', '2 hours', '2 minutes'),
        ('cl4', 'ACTIVE', '2 minutes', NULL),
        ('cl5', 'WAITING', '9 days', NULL),
        ('cl6', 'DONE', '9 days', '9 days'),
        ('cl7', 'FAILED', '9 days', '9 days')
    ) AS v (id, s, made, begun)""",
    table='"app.""v2"" beta"."Job"',
    key='"id"',
    status='"select"',
    setting="timezone = 'Asia/Tokyo'",
    toml="""
    [targets.scene]
    table = '"app.""v2"" beta"."Job"'
    in_flight = ["ACTIVE"]
    waiting = ["WAITING"]
    terminal = ["DONE", "FAILED", "Crashed!"]
    crashed = "Crashed!"

    [targets.scene.columns]
    status = "select"
    tenant_id = "order"
    task = "user"
    worker_id = "group"
    created_at = "createdAt"
    started_at = "startedAt"
    completed_at = "finishedAt"
    error = "errorMessage"
    """,
    orphans={'cl%d "1"': "age", "cl:two": "age"},
)

# A queue in Go: an enum, who tried it as an array, a condition on two columns at once.
GO = Scene(
    ddl="""
    CREATE TYPE job_state AS ENUM
        ('available', 'scheduled', 'running', 'completed', 'cancelled', 'discarded');
    CREATE TABLE job (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        state job_state NOT NULL DEFAULT 'available',
        kind text NOT NULL,
        attempt smallint NOT NULL DEFAULT 0,
        attempted_by text[],
        attempted_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        finalized_at timestamptz,
        errors jsonb[],
        CONSTRAINT finalized CHECK (
            (finalized_at IS NOT NULL) = (state IN ('completed', 'cancelled', 'discarded')))
    )""",
    runs="""
    INSERT INTO job (state, kind, attempt, attempted_by, created_at, attempted_at, finalized_at)
    SELECT s::job_state, 'send_email', 2, ARRAY['a', 'b {c}'], now() - made::interval,
           now() - begun::interval, now() - done::interval
    FROM (VALUES
        ('running', '2 hours', '1 hour', NULL),
        ('running', '2 hours', '1 minute', NULL),
        ('available', '9 days', NULL, NULL),
        ('scheduled', '9 days', NULL, NULL),
        ('completed', '9 days', '9 days', '8 days'),
        ('discarded', '9 days', '9 days', '8 days')
    ) AS v (s, made, begun, done)""",
    table="job",
    status="state",
    toml="""
    [targets.scene]
    table = "job"
    in_flight = ["running"]
    waiting = ["available", "scheduled"]
    terminal = ["completed", "cancelled", "discarded"]
    crashed = "discarded"

    [targets.scene.columns]
    status = "state"
    task = "kind"
    worker_id = "attempted_by"
    started_at = "attempted_at"
    completed_at = "finalized_at"
    """,
    orphans={"1": "age"},
)

# A key of three columns, a time among them, under a zone and a way of writing dates of its own.
COMPOSITE = Scene(
    ddl="""
    CREATE TABLE shard_runs (
        tenant uuid NOT NULL,
        shard integer NOT NULL,
        slot timestamptz NOT NULL,
        status text NOT NULL,
        created_at timestamptz NOT NULL,
        error text,
        PRIMARY KEY (slot, tenant, shard)
    )""",
    runs="""
    INSERT INTO shard_runs (tenant, shard, slot, status, created_at)
    SELECT 'aaaaaaaa-0000-0000-0000-000000000000', shard, slot::timestamptz, s,
           now() - made::interval
    FROM (VALUES
        (1, '2024-03-01 04:05:06.789+00', 'running', '2 hours'),
        (1, '2024-01-03 04:05:06.789+00', 'running', '1 minute'),
        (2, '2024-03-01 04:05:06.789+00', 'queued', '2 hours'),
        (3, '2024-03-01 04:05:06.789+00', 'completed', '9 days')
    ) AS v (shard, slot, s, made)""",
    table="shard_runs",
    key="""jsonb_build_array(
        shard::text, to_char(slot AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS'))::text""",
    setting="timezone = 'America/Los_Angeles'",
    target=Target(
        name="composite", table="shard_runs", columns=Columns(id=("tenant", "shard", "slot"))
    ),
    orphans={
        '["1", "2024-03-01T04:05:06.789"]': "age",
        '["2", "2024-03-01T04:05:06.789"]': "age",
    },
)

# Domains all over, in a schema that is not on the search path.
DOMAINS = Scene(
    ddl="""
    CREATE SCHEMA ops;
    CREATE DOMAIN ops.run_key AS uuid CHECK (VALUE IS NOT NULL);
    CREATE DOMAIN ops.state AS text CHECK (VALUE IN ('queued', 'running', 'done', 'crashed'));
    CREATE DOMAIN ops.state_again AS ops.state NOT NULL;
    CREATE DOMAIN ops.instant AS timestamp(3);
    CREATE DOMAIN ops.message AS varchar(60);
    CREATE TABLE ops.runs (
        id ops.run_key PRIMARY KEY,
        status ops.state_again,
        created_at ops.instant NOT NULL,
        completed_at ops.instant,
        error ops.message
    )""",
    runs="""
    INSERT INTO ops.runs (id, status, created_at)
    SELECT id::uuid, s, timezone('UTC', now() - made::interval)
    FROM (VALUES
        ('00000000-0000-0000-0000-00000000000a', 'running', '2 hours'),
        ('00000000-0000-0000-0000-00000000000b', 'queued', '1 minute'),
        ('00000000-0000-0000-0000-00000000000c', 'done', '9 days')
    ) AS v (id, s, made)""",
    table="ops.runs",
    setting="timezone = 'Asia/Tokyo'",
    target=Target(name="domains", table="ops.runs", terminal=("done", "crashed")),
    orphans={"00000000-0000-0000-0000-00000000000a": "age"},
)

# As little as a table can have.
MINIMAL = Scene(
    ddl="CREATE TABLE r (id int PRIMARY KEY, status text, created_at timestamptz)",
    runs="""
    INSERT INTO r SELECT id, s, now() - made::interval FROM (VALUES
        (1, 'running', '2 hours'), (2, 'running', '1 minute'), (3, 'queued', '2 hours'),
        (4, 'completed', '9 days'), (5, NULL, '9 days'), (6, 'running', NULL)
    ) AS v (id, s, made)""",
    table="r",
    target=Target(name="minimal", table="r"),
    orphans={"1": "age", "3": "age"},
)

SCENES = {
    "rails": RAILS,
    "django": DJANGO,
    "prisma": PRISMA,
    "go": GO,
    "composite": COMPOSITE,
    "domains": DOMAINS,
    "minimal": MINIMAL,
}
