"""How ZeRO-3 gathers the parameters of compiled blocks."""

from __future__ import annotations

from torch import nn

from megadit.models.stages import Stage


def gather_compiled_blocks_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather and release all parameters of a compiled block at once, by hooks of the block.

    Hooks of its layers would cut the block's graph into pieces: torch.compile does not look into them (``Skip calling
    torch.compiler.disable()d function DeepSpeedZeRoOffload._pre_forward_module_hook``). Must be called before
    ``deepspeed.initialize``, which sets the hooks.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, Stage) and module.compiled:
            set_z3_leaf_module(module, True)
