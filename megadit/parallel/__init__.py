"""Ranks and parallelism: launchers, process group, collectives, tensor-parallel layout, activation checkpointing.

environment, launcher        the rank from its launcher's variables; ranks end with their launcher
processes                    rendezvous, the process group and small collectives
consistency_check            configuration, code and data are the same on all ranks
failure_messages             messages of ranks that end with an error
topology                     coordinates of ranks (pipeline, data, tensor), process groups, cuts of a pipeline
tensor, collectives          tensor-parallel layout of a layer, collectives with gradients
recompute, compilation       activation checkpointing, torch.compile
"""

from megadit.parallel.environment import prepare_environment
from megadit.parallel.processes import ProcessContext, start_processes, stop_processes

__all__ = ["ProcessContext", "prepare_environment", "start_processes", "stop_processes"]
