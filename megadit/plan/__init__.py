"""What a run costs: FLOPs per image, memory and messages of its layout, and what a device can do."""

from megadit.plan.describe import describe_plan
from megadit.plan.flops import forward_flops, peak_flops, training_flops
from megadit.plan.layout import LayoutPlan, StagePlan, plan_layout
from megadit.plan.memory import state_bytes

__all__ = [
    "LayoutPlan",
    "StagePlan",
    "describe_plan",
    "forward_flops",
    "peak_flops",
    "plan_layout",
    "state_bytes",
    "training_flops",
]
