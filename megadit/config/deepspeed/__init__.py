"""Merges a DeepSpeed file and a run configuration into DeepSpeed's dictionary, without importing DeepSpeed.

file reads and checks the file, translate lists the run keys that it sets, batch computes batch sizes, gradients the
types of gradient accumulation, and merge combines all into the resolved configuration and dictionary.
"""
