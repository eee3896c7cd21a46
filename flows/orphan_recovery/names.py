"""What flows and deployments are called in Prefect; for those too that do not import it.

The hazard is one who looks for a flow by a name that it no longer has: a doctor that finds no
schedule, a trigger that finds no deployment. ``prefect.yaml`` names the deployments once more.
"""

from typing import Final

FLOW_NAME: Final = "recover-orphaned-runs"
ALL_FLOW_NAME: Final = "recover-all-targets"
BACKTEST_FLOW_NAME: Final = "backtest-thresholds"

SCHEDULED: Final = "scheduled"
"""The deployment on a schedule of the target that is meant by default; ``scheduled-NAME`` of
another."""
ON_DEMAND: Final = "on-demand"
ALL_TARGETS: Final = "all-targets"

TRIGGERED: Final = "triggered"
"""The tag of a flow run that `orphan-recovery trigger` started."""
