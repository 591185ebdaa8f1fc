"""What a run costs: FLOPs per image, memory and messages of its layout, and what a device can do."""

from megadit.plan.describe import describe_plan
from megadit.plan.flops import forward_flops, peak_flops, training_flops

__all__ = ["describe_plan", "forward_flops", "peak_flops", "training_flops"]
