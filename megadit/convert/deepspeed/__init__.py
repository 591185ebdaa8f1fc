"""DeepSpeed's own checkpoints: native ones of every ZeRO stage, and universal ones."""
