"""How processes find each other (environment, devices, small collectives), and how blocks run: recomputed, compiled."""

from megadit.parallel.environment import prepare_environment
from megadit.parallel.processes import ProcessContext, start_processes, stop_processes

__all__ = ["ProcessContext", "prepare_environment", "start_processes", "stop_processes"]
