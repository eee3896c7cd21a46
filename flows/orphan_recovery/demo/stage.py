"""The stage: what every act of the demo works with, handed around as one."""

from dataclasses import dataclass

from orphan_recovery.demo.facts import Facts
from orphan_recovery.demo.orchestrator import Orchestrator
from orphan_recovery.demo.processes import Processes
from orphan_recovery.demo.show import Show


@dataclass(frozen=True, slots=True)
class Stage:
    """The demo's own servers, and the viewer's screen."""

    show: Show
    processes: Processes
    facts: Facts
    orchestrator: Orchestrator
    database_url: str
