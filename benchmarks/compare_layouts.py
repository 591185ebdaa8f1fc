"""Which layout of a number of GPUs a run should take: a step's time by the plan's counts and assumed speeds.

    python benchmarks/compare_layouts.py --config configs/mmdit/18b-mup.yaml --world 64 128 256

Tensor-parallel sizes of 1, 2, 4 and 8, each of more than 1 with and without sequence parallelism (s), up to 16 stages,
micro batches of 2 to 16, ZeRO 1, nothing recomputed: (arithmetic + tensor bytes + pipeline bytes) / (1 - waiting) +
data bytes, with nothing overlapped. Ranks that share a layer are within a host, and so are the replicas of a stage that
fits into one; stages are not. Prints the fastest.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

SHARES = (("1", False), ("2", False), ("2s", True), ("4", False), ("4s", True), ("8", False), ("8s", True))
STAGES = (1, 2, 4, 8, 16)
MICRO = (2, 4, 8, 16)
HOST = 8  # GPUs
DEEPSPEED = {  # as of configs/deepspeed/mmdit-18b-*.json: float32 sums, sent as they are
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 2 * 10**8},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


def main() -> None:
    """Parse arguments, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--world", type=int, nargs="+", required=True, help="numbers of GPUs")
    parser.add_argument("--tflops", type=float, default=160, help="of a GPU, reached")
    parser.add_argument("--inside", type=float, default=230, help="GB/s of a GPU within a host")
    parser.add_argument("--between", type=float, default=25, help="GB/s of a GPU between hosts")
    parser.add_argument("--memory", type=float, default=72, help="GB of a GPU to be filled")
    parser.add_argument("--rows", type=int, default=10)
    args = parser.parse_args()
    counted = list(_count(args.config))
    for world in args.world:
        print(f"{world} GPUs: seconds, tensor x pipeline x data, micro batch, of them in a step, GB, waiting")
        rows = [row for stages in counted for micro in MICRO for row in _step(stages, world, micro, args)]
        for seconds, layout, micro, many, memory, idle in sorted(rows)[: args.rows]:
            print(f"{seconds:.3f}  {layout:>11}  {micro:>2}  {many:>4}  {memory:5.1f}  {100 * idle:.1f}%")


def _count(path: str) -> Iterator[dict[str, Any]]:
    import torch

    from megadit.config import load_config
    from megadit.parallel.topology import balanced_cuts
    from megadit.plan.flops import stage_flops
    from megadit.plan.memory import stage_costs

    config = load_config(path)
    flops = stage_flops(config.model)
    for name, sequence in SHARES:
        for pipeline in STAGES:
            tensor, cuts = int(name[0]), balanced_cuts(flops, pipeline)
            costs = stage_costs(config.model, cuts, MICRO[0], torch.bfloat16, "none", tensor, sequence=sequence)
            yield {
                "config": config,
                "tensor": tensor,
                "name": name,
                "work": [sum(flops[a:b]) for a, b in pairwise(cuts)],
                "stages": [(sum(p.numel() for p in chunk.parameters()), cost) for chunk, cost in costs],
            }


def _step(counted: dict[str, Any], world: int, micro: int, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """What this layout takes of ``world`` GPUs, if it goes."""
    from megadit.config.deepspeed.gradients import bucket_bytes
    from megadit.plan.bubble import idle_share
    from megadit.plan.communication import data_bytes, tensor_bytes
    from megadit.plan.memory import state_bytes

    tensor, stages, work = counted["tensor"], counted["stages"], counted["work"]
    batch, averages = counted["config"].train.global_batch, len(counted["config"].ema.names)
    replicas = world // (tensor * len(stages))
    many, rest = divmod(batch, max(replicas, 1) * micro)
    if replicas < 1 or rest:
        return
    times, memory, sent = micro / MICRO[0], [], Counter[str]()
    for stage, (held, cost) in enumerate(stages):
        flying = min(len(stages) - stage, many)
        state = state_bytes(held, replicas, 1, "bf16", averages, 4)
        buckets = bucket_bytes(DEEPSPEED, held, "bf16", len(stages) > 1)
        memory.append(
            (sum(state.values()) + buckets + ((flying - 1) * cost.saved_bytes + cost.peak_bytes) * times) / 1e9
        )
        calls = tensor_bytes(cost.forward + cost.backward, tensor)
        pipeline = cost.output_bytes + cost.input_grad_bytes if len(stages) > 1 else 0
        data = data_bytes(held, 2, replicas, 1, many, recompute=False, gradient=4)
        for kind, size in (
            ("tensor", sum(calls.values()) * many * times),
            ("pipeline", pipeline * many * times),
            ("data", sum(data.values())),
        ):
            sent[kind] = max(sent[kind], size / 1e9)  # type: ignore[assignment]
    if max(memory) > args.memory:
        return
    idle = idle_share(work, many)
    arithmetic = 3 * sum(work) * batch / world / args.tflops / 1e12
    inside = arithmetic + sent["tensor"] / args.inside + sent["pipeline"] / args.between
    speed = args.inside if tensor * replicas <= HOST else args.between
    layout = f"{counted['name']} x {len(stages)} x {replicas}"
    yield inside / (1 - idle) + sent["data"] / speed, layout, micro, many, max(memory), idle


if __name__ == "__main__":
    main()
