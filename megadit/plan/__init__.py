"""What a run costs: FLOPs per image, memory of its state, and what a device can do."""

from megadit.plan.describe import describe_plan, state_bytes
from megadit.plan.flops import forward_flops, peak_flops

__all__ = ["describe_plan", "forward_flops", "peak_flops", "state_bytes"]
