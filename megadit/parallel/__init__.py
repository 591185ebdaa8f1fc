"""Processes and what they share: how they find each other, small and large exchanges, a rank's share of layers.

environment, launcher   which launcher started this rank, and what happens when it is gone
processes, agreement    the process group and its end; whether all ranks run the same thing
failure_messages              what is told of a rank that ends with an error
topology                every rank's place: pipeline, replica, share; where stages are cut
tensor, collectives     a rank's share of heads, channels and tokens, and the sums with their gradients
recompute, compilation  how blocks run: recomputed, compiled
"""

from megadit.parallel.environment import prepare_environment
from megadit.parallel.processes import ProcessContext, start_processes, stop_processes

__all__ = ["ProcessContext", "prepare_environment", "start_processes", "stop_processes"]
