"""AdamW over float32 masters and their low-precision copies, in one pass (``fused``), beside torch (``reference``).

``FusedAdamW`` is the optimizer; ``ApexAdamW`` steps by NVIDIA apex's kernel instead. Importing this package needs
neither Triton nor apex.
"""

from megadit_kernels.adamw.apex import ApexAdamW
from megadit_kernels.adamw.optimizer import FusedAdamW
from megadit_kernels.adamw.reference import Shard, update

__all__ = ["ApexAdamW", "FusedAdamW", "Shard", "update"]
