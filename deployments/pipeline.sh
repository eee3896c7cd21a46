#!/bin/sh
# A step of a deploy pipeline, after the old worker was stopped: recover what it held.
#
#   OLD_WORKER=worker-7 RELEASE=2.4.1 deployments/pipeline.sh
#
# Needs PREFECT_API_URL, and ORPHAN_RECOVERY_DATABASE_URL of the tables' owner for the migration.
# Fails, and so stops the pipeline, unless both sweeps end well.
set -eu

# An empty name must not become "all workers". (The command refuses it as well.)
: "${OLD_WORKER:?name the worker that was replaced}"
: "${RELEASE:?name the release that replaced it}"

# The deployment's threshold holds, unless THRESHOLD_MINUTES names another. A worker that was
# stopped just now is not silent for long: keep it above three heartbeats, and wait that long.
set -- --wait --worker "$OLD_WORKER" ${THRESHOLD_MINUTES:+--threshold-minutes "$THRESHOLD_MINUTES"}

orphan-recovery migrate
orphan-recovery trigger "$@" --dry-run
orphan-recovery trigger "$@" --reason "orphaned: worker replaced by release $RELEASE"
