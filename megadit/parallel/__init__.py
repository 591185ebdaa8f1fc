"""How processes find each other: environment, devices and small collectives."""

from megadit.parallel.processes import ProcessContext, prepare_environment, start_processes, stop_processes

__all__ = ["ProcessContext", "prepare_environment", "start_processes", "stop_processes"]
