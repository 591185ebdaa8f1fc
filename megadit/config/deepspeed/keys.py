"""The keys of a DeepSpeed 0.19 file: those it reads, and the blocks that megadit refuses, with the reason."""

from __future__ import annotations

# fmt: off
# Top-level keys that DeepSpeed 0.19 reads.
KNOWN_KEYS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline",
    "prescale_gradients", "scheduler", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})

# Keys of the zero_optimization block in DeepSpeed 0.19.
ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "cpu_offload",
    "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks",
    "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings",
    "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce", "zenflow",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
})
# fmt: on

_REMOVED = "DeepSpeed 0.19 no longer has it; take it out"
_OWN_DATA = "megadit numbers and feeds the samples itself; take it out"

# Blocks that are refused when they are on, and dropped when they say "enabled": false.
REFUSED_BLOCKS = {
    "amp": _REMOVED + " and set bf16 or fp16",
    "autotuning": "it would start trial runs of its own; take it out",
    "compression_training": _REMOVED,
    "curriculum_learning": _OWN_DATA,
    "data_efficiency": _OWN_DATA,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED + ": the global batch is train.global_batch",
    "expert_parallel": "megadit's models have no experts; take it out",
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "it is for generation with language models; take it out",
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "tensor_parallel": "AutoTP replaces layers and drops their muP multipliers without a word; take it out",
}

# Blocks that configure functions of DeepSpeed's which megadit does not call.
IDLE_BLOCKS = {
    "activation_checkpointing": "has no effect on megadit's models; set train.activation_checkpointing",
    "compile": "has no effect on megadit's models; set train.compile",
}
