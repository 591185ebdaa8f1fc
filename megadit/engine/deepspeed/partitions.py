"""Master weights and optimizer state of a DeepSpeed engine, by parameter: which range of which one this rank owns.

DeepSpeed keeps float32 masters and Adam's moments in flat buffers that differ by ZeRO stage (``zero_stages``).
Checkpoints, and whatever else follows the masters, work on *fragments* instead: a canonical parameter name and an index
range of the flattened parameter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadit.engine.clipping import ClipPlan
from megadit.engine.deepspeed.zero_stages import ZERO_STAGES, DelayedScaleGrowth
from megadit.mup.spec import walk_slices
from megadit.parallel.topology import Topology
from megadit.slices import ShardRegions

MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what fp16's scaler changes as it runs


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter ``name``, whose global shape is ``shape``.

    ``values`` is a writable 1-D float32 view into ``flat``, the tensor that the optimizer steps, beginning
    at ``offset``. A rank that holds a slice of the parameter (tensor parallelism) names it by ``shard_regions``
    (megadit.slices), and start and stop count in it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor
    flat: Tensor
    offset: int
    shard_regions: ShardRegions | None = None


def avoid_shm_build() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory op when it wraps the process group.

    Only its inference all-reduce uses the op; building it takes up to a minute, needs a compiler, and a killed build
    leaves a lock that blocks every later run.
    """
    import deepspeed  # noqa: F401  (makes the module below exist)

    # ``import deepspeed.comm.torch as m`` would bind plain torch, which shadows the submodule's name.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def forget_groups() -> None:
    """Release the process groups that DeepSpeed holds of this process's earlier engines, which may be destroyed."""
    from deepspeed.utils import groups

    groups.mpu = None
    world_group = groups._WORLD_GROUP
    if world_group is not None and torch.distributed.is_initialized():
        try:
            torch.distributed.get_process_group_ranks(world_group)
        except (KeyError, ValueError):  # the group was destroyed
            groups._release_process_group_references()


def restore_linear() -> None:
    """Restore torch's ``F.linear``, which a ZeRO-3 engine of this process has replaced.

    A later run of the process would compute with DeepSpeed's: other bits, and additions in place.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Init

    torch.nn.functional.linear = getattr(Init, "linear_bk", torch.nn.functional.linear)


class Partitions:
    """This rank's shard of the master weights and optimizer state of a DeepSpeed engine."""

    def __init__(
        self, engine: Any, clip: ClipPlan, topology: Topology | None = None, model: nn.Module | None = None
    ) -> None:
        """``model`` owns the parameters under their canonical names (default: the engine's module)."""
        self._engine = engine
        self._topology = topology or Topology(torch.distributed.get_world_size(), torch.distributed.get_rank())
        self.stage = int(engine.zero_optimization_stage())
        if self.stage == 0 and int(engine.dp_world_size) == 1:
            # One rank has nothing to average, yet DeepSpeed would flatten and copy back every gradient.
            engine.enable_backward_allreduce = False
        self._zero = ZERO_STAGES[self.stage](engine, clip)
        self.guard, self.norms = self._zero.guard, self._zero.norms
        if self._dynamic_scaler() is not None:
            DelayedScaleGrowth(engine.optimizer)
        self._parameters = {
            id(p): (name, spec.shape, shard_regions)
            for name, p, spec, shard_regions in walk_slices(engine.module if model is None else model)
            if p.requires_grad
        }

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper (its groups hold the flat buffers)."""
        return self._zero.optimizer

    def before_step(self, want_norms: bool) -> None:
        """To be called between the last backward pass and the step. ``want_norms``: ``norms`` are read after it."""
        self._zero.before_step(want_norms)

    def fragments_to_save(self) -> list[Fragment]:
        """The ``fragments`` that this rank saves: those of all ranks together contain each element once."""
        if self.stage == 0 and self._topology.data_rank > 0:
            return []
        return [f for f in self.fragments() if f.shard_regions is not None or self._topology.tensor_rank == 0]

    def fragments(self) -> list[Fragment]:
        """All fragments that this rank owns, in a fixed order."""
        fragments = []
        for p, start, stop, flat, offset in self._zero.master_ranges():
            if self._zero.may_pad_groups and id(p) not in self._parameters:
                continue
            name, shape, shard_regions = self._parameters[id(p)]
            values = flat.data.view(-1).narrow(0, offset, stop - start)
            fragments.append(Fragment(name, shape, start, stop, values, flat, offset, shard_regions))
        return fragments

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Adam's moments of a fragment as writable 1-D float32 views; zeros before the first step."""
        state = self.optimizer.state[fragment.flat]
        if MOMENTS[0] not in state:
            state.update(self._fresh_state(fragment.flat))
        count = fragment.stop - fragment.start
        return {key: state[key].view(-1).narrow(0, fragment.offset, count) for key in MOMENTS}

    def nonfinite_parameters(self, sources: Sequence[Callable[[Fragment], dict[str, Tensor]]]) -> list[str]:
        """Names of this rank's parameters of which a weight, a moment or a value of ``sources`` is not finite."""
        names, extremes = [], []
        for f in self.fragments():
            others = [value for source in sources for value in source(f).values()]
            for values in (f.values, *self.moments(f).values(), *others):
                names.append(f.name)
                extremes.append(torch.stack(torch.aminmax(values)))
        if not extremes:
            return []
        finite = torch.stack([pair.to(extremes[0].device) for pair in extremes]).isfinite().all(1).tolist()
        return list(dict.fromkeys(name for name, good in zip(names, finite, strict=True) if not good))

    def _fresh_state(self, flat: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        if isinstance(self.optimizer, torch.optim.AdamW):
            fused = bool(self.optimizer.defaults.get("fused"))
            # torch keeps the step of a fused optimizer beside its parameters, else on the CPU.
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        else:  # DeepSpeed's FusedAdam and CPUAdam count in plain integers
            state["step"] = 0
        return state

    def adam_step(self) -> int:
        """How many updates Adam's bias correction has counted (the same for every buffer)."""
        # A buffer that is padding alone on this rank is in no checkpoint, and begins anew after a resume.
        flats = {id(f.flat): f.flat for f in self.fragments()}
        states = [self.optimizer.state.get(flat, {}) for flat in flats.values()]
        counts = {int(state["step"]) for state in states if "step" in state}
        if len(counts) > 1:
            raise RuntimeError(f"Adam's step counters differ between parameter groups: {sorted(counts)}")
        return counts.pop() if counts else 0

    def set_adam_step(self, step: int) -> None:
        """Set every buffer's own step counter (never one tensor shared by several groups)."""
        for state in self.optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(step))
            else:
                state["step"] = step

    def publish_masters(self) -> None:
        """After writing into ``values``: copy the masters into the weights that the model runs with (collective)."""
        self._zero.publish_masters()

    def gradient_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients, unscaled and before clipping.

        Infinite where a gradient was not finite, for which ZeRO says inf, nan or a negative number. At stage 0, where
        DeepSpeed reports none, of the norms that ``before_step`` took. None before the first step.
        """
        norm = self._zero.global_norm()
        if norm is None:
            return None
        value = float(norm)
        return value if math.isfinite(value) and value >= 0 else math.inf

    def loss_scale_state(self) -> dict[str, Any]:
        """The state of the dynamic loss scaler (fp16), by the names of ``LOSS_SCALE``; empty without one."""
        scaler = self._dynamic_scaler()
        return {} if scaler is None else {key: getattr(scaler, key) for key in LOSS_SCALE}

    def load_loss_scale_state(self, state: dict[str, Any]) -> None:
        """Restore what ``loss_scale_state`` returned, if this run scales its loss dynamically."""
        scaler = self._dynamic_scaler()
        if scaler is not None:
            vars(scaler).update({key: state[key] for key in LOSS_SCALE if key in state})

    def _dynamic_scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if self._engine.fp16_enabled() and getattr(scaler, "dynamic", False) else None

    def set_counters(self, steps: int, samples: int, skipped: int) -> None:
        """Set DeepSpeed's own counters to a resumed position."""
        engine = self._engine
        engine.global_steps, engine.global_samples, engine.skipped_steps = steps, samples, skipped
        engine.micro_steps = steps * engine.gradient_accumulation_steps()
