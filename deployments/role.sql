-- A database role for the sweep that may do what a sweep does, and nothing else.
--
--   psql "$OWNER_URL" -v role=orphan_recovery_sweep -f deployments/role.sql
--
-- As the owner of the tables, with the right to create roles; after `orphan-recovery migrate`,
-- which needs the owner too. Again and again without harm: each time the role is cut back to
-- this. It is created without a password; give it one with \password, or by your own means.
--
-- It can wrongly do no more than mark a run in flight as ended: it cannot delete, cannot touch
-- what is terminal, and does not see what a run was given or gave back.

\set ON_ERROR_STOP on
\if :{?role}
\else
  \set role orphan_recovery_sweep
\endif

BEGIN;

SELECT format('CREATE ROLE %I LOGIN', :'role')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role')
\gexec

REVOKE ALL ON worker_runs FROM :"role";
REVOKE ALL ON ALL TABLES IN SCHEMA orphan_recovery FROM :"role";
REVOKE ALL ON SCHEMA orphan_recovery FROM :"role";

SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'role'),
       format('GRANT USAGE ON SCHEMA %s TO %I', relnamespace::regnamespace, :'role')
FROM pg_class WHERE oid = 'worker_runs'::regclass
\gexec

-- Locking a row needs UPDATE on one of its columns: these do.
GRANT SELECT (id, status, worker_id, tenant_id, task, attempt, is_retry, parent_run_id,
              created_at, started_at, heartbeat_at, completed_at, success, error),
      UPDATE (status, success, error, completed_at)
ON worker_runs TO :"role";

GRANT USAGE ON SCHEMA orphan_recovery TO :"role";
GRANT SELECT, INSERT ON orphan_recovery.sweeps, orphan_recovery.verdicts TO :"role";
GRANT UPDATE (ended_at, ended_as, detected, marked, missed, failed, error)
ON orphan_recovery.sweeps TO :"role";

COMMIT;
