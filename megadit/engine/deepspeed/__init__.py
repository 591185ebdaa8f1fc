"""All code that depends on DeepSpeed's internals."""
