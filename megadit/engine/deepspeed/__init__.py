"""The one door to DeepSpeed's internals."""
