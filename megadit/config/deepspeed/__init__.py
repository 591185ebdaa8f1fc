"""From a DeepSpeed file and a run configuration to DeepSpeed's dictionary, without importing DeepSpeed.

file reads it, translate says what it asks for, batch and gradients decide, merge makes the one answer for both.
"""
