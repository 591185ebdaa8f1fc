"""Cost of a run before it starts: FLOPs, memory and communication of its layout, pipeline bubble, peak FLOP/s."""

from megadit.plan.describe import describe_plan
from megadit.plan.flops import forward_flops, peak_flops, training_flops

__all__ = ["describe_plan", "forward_flops", "peak_flops", "training_flops"]
