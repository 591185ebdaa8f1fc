"""From a DeepSpeed file and a run configuration to DeepSpeed's dictionary."""
