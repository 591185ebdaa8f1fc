"""DeepSpeed files merged into run configurations: who wins, what comes out, what contradicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadit.config import LoadedConfig, load, merge_ds_config, save_config
from megadit.config.loading.sources import configs_dir
from megadit.errors import UserError

BASE = (
    "model: {width: 64, head_dim: 16, depth: 1, parametrization: mup, base_width: 64}\n"
    "train: {steps: 100, global_batch: 64}\n"
)


def as_default(tmp_path: Path, text: str = BASE, *overrides: str) -> LoadedConfig:
    """A configuration whose file counts as defaults, as the quickstart's does; overrides are the user's."""
    (tmp_path / "c.yaml").write_text(text)
    loaded = load(tmp_path / "c.yaml", overrides)
    user_set = {key: source for key, source in loaded.user_set.items() if source == "an override"}
    return LoadedConfig(loaded.config, user_set, "c.yaml")


def value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def at(ds: Any, key: str) -> Any:
    for part in key.split("."):
        ds = ds[part]
    return ds


def nested(key: str, item: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        item = {part: item}
    return item


# run key, value the user sets, DeepSpeed key, the same value there, another value there, its run value
PAIRS = [
    ("train.global_batch", "128", "train_batch_size", 128, 32, 32),
    ("train.micro_batch", "8", "train_micro_batch_size_per_gpu", 8, 4, 4),
    ("parallel.zero_stage", "1", "zero_optimization.stage", 1, 2, 2),
    ("train.precision", "bf16", "bf16.enabled", True, False, "fp32"),
    ("train.precision", "fp16", "fp16.enabled", True, False, "fp32"),
    ("optim.clip.value", "0.5", "gradient_clipping", 0.5, 2, 2.0),
    ("optim.clip.value", "null", "gradient_clipping", 0.0, 2.5, 2.5),
    ("optim.clip.value", "1.0", "gradient_clipping", 1, 0, None),
]
OPTIMIZER_PAIRS = [
    ("optim.lr", "1e-3", "lr", 0.001, 0.002, 0.002),
    ("optim.eps", "1e-10", "eps", 1e-10, 1e-6, 1e-6),
    ("optim.weight_decay", "0.1", "weight_decay", 0.1, 0.2, 0.2),
    ("optim.betas", "[0.8, 0.9]", "betas", [0.8, 0.9], [0.7, 0.9], (0.7, 0.9)),
]


class TestWhoWins:
    @pytest.mark.parametrize(("key", "user", "ds_key", "same", "other", "other_run"), PAIRS)
    def test_scalar_keys(self, tmp_path: Path, key, user, ds_key, same, other, other_run):
        mine = as_default(tmp_path, BASE, f"{key}={user}")
        # left out and "auto": from the run configuration
        for ds in (None, {}, nested(ds_key, "auto")):
            merged = merge_ds_config(mine, ds, 1)
            assert value(merged.config, key) == value(mine.config, key)
            assert at(merged.ds_config, ds_key) == same
        # the same value: no contradiction
        assert value(merge_ds_config(mine, nested(ds_key, same), 1).config, key) == value(mine.config, key)
        # another value: an error that names both keys, values and places
        with pytest.raises(UserError) as error:
            merge_ds_config(mine, nested(ds_key, other), 1)
        shown = json.dumps(value(mine.config, key))
        assert str(error.value).startswith(
            f"{key}: {shown} (in an override) contradicts {ds_key}: {json.dumps(other)} (in ds_config)"
        )
        # over a default the file wins, and both sides agree
        merged = merge_ds_config(as_default(tmp_path), nested(ds_key, other), 1)
        assert value(merged.config, key) == other_run
        assert at(merged.ds_config, ds_key) == other

    @pytest.mark.parametrize(("key", "user", "ds_key", "same", "other", "other_run"), OPTIMIZER_PAIRS)
    def test_optimizer_keys(self, tmp_path: Path, key, user, ds_key, same, other, other_run):
        def block(item: Any) -> dict[str, Any]:
            return {"optimizer": {"type": "AdamW", "params": {ds_key: item}}}

        mine = as_default(tmp_path, BASE, f"{key}={user}")
        for item in ("auto", same):
            assert value(merge_ds_config(mine, block(item), 1).config, key) == value(mine.config, key)
        with pytest.raises(UserError, match=rf"^{key}: .* contradicts optimizer.params.{ds_key}: "):
            merge_ds_config(mine, block(other), 1)
        merged = merge_ds_config(as_default(tmp_path), block(other), 1)
        assert value(merged.config, key) == other_run
        assert "optimizer" not in merged.ds_config

    def test_a_named_file_counts_as_set_by_the_user(self, tmp_path: Path):
        (tmp_path / "c.yaml").write_text(BASE)
        (tmp_path / "ds.json").write_text('{"train_batch_size": 32}')
        with pytest.raises(
            UserError, match=r"^train.global_batch: 64 \(in .*c.yaml\) contradicts .*: 32 \(in .*ds.json\)"
        ):
            merge_ds_config(load(tmp_path / "c.yaml"), tmp_path / "ds.json", 1)

    def test_the_quickstart_does_not(self):
        merged = merge_ds_config(load(), {"train_batch_size": 24, "gradient_clipping": 7}, 2)
        assert (merged.config.train.global_batch, merged.config.optim.clip.value) == (24, 7.0)

    def test_all_contradictions_are_told(self, tmp_path: Path):
        mine = as_default(tmp_path, BASE, "optim.lr=1e-3", "parallel.zero_stage=1")
        ds = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1}}}
        with pytest.raises(UserError) as error:
            merge_ds_config(mine, ds, 1)
        assert [line.split(":")[0] for line in str(error.value).split("\n")] == ["parallel.zero_stage", "optim.lr"]

    def test_null_is_no_wish_where_it_means_choose_for_me(self, tmp_path: Path):
        mine = as_default(tmp_path, BASE, "parallel.zero_stage=null", "train.micro_batch=null")
        merged = merge_ds_config(mine, {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4}, 1)
        assert (merged.config.parallel.zero_stage, merged.config.train.micro_batch) == (3, 4)

    def test_values_from_the_file_are_checked_like_any_others(self, tmp_path: Path):
        ds = {"optimizer": {"type": "AdamW", "params": {"lr": -1.0}}}
        with pytest.raises(UserError, match=r"^optim.lr: -1.0 is not greater than 0 \(in ds_config\)$"):
            merge_ds_config(as_default(tmp_path), ds, 1)


class TestResult:
    def test_what_is_always_written_out(self, tmp_path: Path):
        merged = merge_ds_config(as_default(tmp_path), None, 2)
        assert merged.ds_config == {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 32,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "steps_per_print": 10**9,
        }
        assert merged.warnings == ()
        assert (merged.config.train.micro_batch, merged.config.parallel.zero_stage) == (32, 1)

    def test_the_rest_passes_through_and_auto_is_left_to_deepspeed(self, tmp_path: Path):
        ds = {
            "steps_per_print": 10,
            "wall_clock_breakdown": True,
            "comms_logger": {"enabled": True, "verbose": False},
            "communication_data_type": "auto",
            "fp16": {"enabled": "auto", "initial_scale_power": 12, "loss_scale": 0},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": 1000,
                "offload_param": {"device": "cpu", "pin_memory": "auto"},
            },
        }
        before = json.dumps(ds)
        merged = merge_ds_config(as_default(tmp_path), ds, 1).ds_config
        assert json.dumps(ds) == before
        assert (merged["steps_per_print"], merged["wall_clock_breakdown"]) == (10, True)
        assert merged["comms_logger"] == {"enabled": True, "verbose": False}
        assert "communication_data_type" not in merged
        assert merged["fp16"] == {"enabled": False, "initial_scale_power": 12, "loss_scale": 0}
        assert merged["zero_optimization"] == {
            "stage": 3,
            "overlap_comm": True,
            "stage3_prefetch_bucket_size": 1000,
            "offload_param": {"device": "cpu"},
        }

    @pytest.mark.parametrize(
        ("world", "precision", "stage"),
        [(1, "fp32", 0), (2, "fp32", 1), (1, "bf16", 1), (1, "fp16", 1), (8, "bf16", 1)],
    )
    def test_default_stage(self, tmp_path: Path, world: int, precision: str, stage: int):
        mine = as_default(tmp_path, BASE, f"train.precision={precision}")
        merged = merge_ds_config(mine, None, world)
        assert merged.config.parallel.zero_stage == stage
        assert merged.ds_config["zero_optimization"]["stage"] == stage
        assert merged.ds_config["bf16"]["enabled"] is (precision == "bf16")
        assert merged.ds_config["fp16"]["enabled"] is (precision == "fp16")

    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("path", sorted((configs_dir() / "deepspeed").glob("*.json")), ids=lambda p: p.stem)
    def test_merging_its_own_result_again_changes_nothing(self, tmp_path: Path, path: Path, world: int):
        mine = as_default(tmp_path)
        once = merge_ds_config(mine, path, world)
        again = merge_ds_config(mine, once.ds_config, world)
        assert (again.config, again.ds_config) == (once.config, once.ds_config)
        # and with the resolved configuration, all of it set by the user, too
        save_config(once.config, tmp_path / "resolved.yaml")
        resolved = merge_ds_config(load(tmp_path / "resolved.yaml"), once.ds_config, world)
        assert (resolved.config, resolved.ds_config) == (once.config, once.ds_config)

    @pytest.mark.parametrize("path", sorted((configs_dir() / "deepspeed").glob("*.json")), ids=lambda p: p.stem)
    def test_deepspeed_takes_it(self, tmp_path: Path, path: Path):
        config = pytest.importorskip("deepspeed.runtime.config")
        merged = merge_ds_config(as_default(tmp_path), path, 1)
        assert merged.warnings == ()
        parsed = config.DeepSpeedConfig(dict(merged.ds_config))
        # Those of one large run say their own: so many micro batches of 4.
        many = {"mmdit-18b-64": 256, "mmdit-18b-128": 256, "mmdit-18b-256": 128}
        assert parsed.train_batch_size == (4 * many[path.stem] if path.stem in many else 64)
        assert parsed.gradient_clipping == 0.0
        assert parsed.zero_optimization_stage == merged.config.parallel.zero_stage
        assert parsed.bfloat16_config.enabled == (merged.config.train.precision == "bf16")

    def test_deepspeed_would_clip_if_the_key_were_absent(self):
        # The reason why the key is always written. When this fails, DeepSpeed has mended it.
        config = pytest.importorskip("deepspeed.runtime.config")
        assert config.DeepSpeedConfig({"train_batch_size": 1}).gradient_clipping == 1.0


class TestOptimizerBlock:
    @pytest.mark.parametrize(
        ("kind", "params", "implementation"),
        [
            ("AdamW", {}, "auto"),
            ("Adam", {}, "auto"),
            ("AdamW", {"torch_adam": True}, "auto"),
            ("AdamW", {"torch_adam": False}, "deepspeed-fused"),
            ("adamw", {"torch_adam": True, "foreach": True}, "torch-foreach"),
            ("AdamW", {"fused": True}, "torch-fused"),
            ("FusedAdam", {}, "deepspeed-fused"),
            ("CPUAdam", {}, "deepspeed-cpu"),
            ("DeepSpeedCPUAdam", {}, "deepspeed-cpu"),
            ("MuAdamW", {}, "auto"),
            ("auto", {"lr": 1e-3}, "auto"),
        ],
    )
    def test_implementation(self, tmp_path: Path, kind: str, params: dict[str, Any], implementation: str):
        merged = merge_ds_config(as_default(tmp_path), {"optimizer": {"type": kind, "params": params}}, 1)
        assert merged.config.optim.implementation == implementation

    def test_torch_adam_agrees_with_any_torch_implementation(self, tmp_path: Path):
        ds = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
        mine = as_default(tmp_path, BASE, "optim.implementation=torch-foreach")
        assert merge_ds_config(mine, ds, 1).config.optim.implementation == "torch-foreach"
        with pytest.raises(
            UserError, match=r'^optim.implementation: "deepspeed-cpu" .* contradicts .*torch_adam: true'
        ):
            merge_ds_config(as_default(tmp_path, BASE, "optim.implementation=deepspeed-cpu"), ds, 1)
        with pytest.raises(UserError, match=r'^optim.implementation: "fused" .* contradicts .*torch_adam: true'):
            merge_ds_config(as_default(tmp_path, BASE, "optim.implementation=fused"), ds, 1)

    @pytest.mark.parametrize("implementation", ["fused", "apex"])
    def test_optimizers_that_deepspeed_does_not_know_are_let_through(self, tmp_path: Path, implementation: str):
        loaded = as_default(tmp_path, BASE, f"optim.implementation={implementation}")
        assert merge_ds_config(loaded, {}, 1).ds_config["zero_allow_untested_optimizer"] is True
        assert "zero_allow_untested_optimizer" not in merge_ds_config(as_default(tmp_path), {}, 1).ds_config

    def test_mu_adamw_decays_as_the_mup_package_does(self, tmp_path: Path):
        def optim(**params: Any):
            ds = {"optimizer": {"type": "MuAdamW", "params": params}}
            return merge_ds_config(as_default(tmp_path), ds, 1).config.optim

        assert optim(lr=1e-3).wd_vectors is False  # without decay there is nothing to say
        assert (optim(weight_decay=0.1).wd_vectors, optim(weight_decay=0.1).wd_mode) == (True, "independent")
        assert optim(weight_decay=0.1, decoupled_wd=True).wd_mode == "constant"


class TestScheduler:
    def test_warmup(self, tmp_path: Path):
        ds = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 30, "warmup_max_lr": None}}}
        merged = merge_ds_config(as_default(tmp_path, BASE + "optim: {schedule: cosine}\n"), ds, 1)
        assert (merged.config.optim.schedule, merged.config.optim.warmup_steps) == ("constant", 30)
        assert "scheduler" not in merged.ds_config

    def test_cosine(self, tmp_path: Path):
        params = {"total_num_steps": 500, "warmup_num_steps": 20, "cos_min_ratio": 0.1, "warmup_type": "linear"}
        ds = {"scheduler": {"type": "WarmupCosineLR", "params": params}}
        config = merge_ds_config(as_default(tmp_path), ds, 1).config
        assert (config.optim.schedule, config.optim.warmup_steps, config.optim.min_lr_ratio) == ("cosine", 20, 0.1)
        assert config.train.steps == 500

    def test_auto_and_absent_come_from_the_run(self, tmp_path: Path):
        params = {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_max_lr": "auto"}
        del params["warmup_max_lr"]
        mine = as_default(tmp_path, BASE + "optim: {warmup_steps: 7, min_lr_ratio: 0.2}\n")
        ds = {"scheduler": {"type": "WarmupCosineLR", "params": params}}
        config = merge_ds_config(mine, ds, 1).config
        assert (config.optim.schedule, config.optim.warmup_steps, config.optim.min_lr_ratio) == ("cosine", 7, 0.2)
        assert config.train.steps == 100

    def test_length_contradicts_steps_and_epochs_of_the_user(self, tmp_path: Path):
        ds = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 500}}}
        with pytest.raises(UserError, match=r"^train.steps: 9 .* contradicts scheduler.params.total_num_steps: 500"):
            merge_ds_config(as_default(tmp_path, BASE, "train.steps=9"), ds, 1)
        with pytest.raises(UserError, match=r"^train.epochs: 2.0 .* contradicts scheduler.params.total_num_steps: 500"):
            merge_ds_config(as_default(tmp_path, BASE, "train.epochs=2"), ds, 1)

    def test_length_contradicts_a_resolved_configuration(self, tmp_path: Path):
        # It sets every key, epochs to null among them.
        save_config(as_default(tmp_path).config, tmp_path / "config.yaml")
        ds = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 500}}}
        with pytest.raises(UserError, match=r"train.steps: 100 .* contradicts scheduler.params.total_num_steps: 500"):
            merge_ds_config(load(tmp_path / "config.yaml"), ds, 1)

    def test_schedule_contradicts(self, tmp_path: Path):
        ds = {"scheduler": {"type": "WarmupLR", "params": {}}}
        with pytest.raises(UserError, match=r'^optim.schedule: "wsd" .* contradicts scheduler.type: "WarmupLR"'):
            merge_ds_config(as_default(tmp_path, BASE, "optim.schedule=wsd"), ds, 1)


OFFLOAD: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


class TestOffload:
    def test_torch_runs_there_unless_deepspeed_is_asked_for(self, tmp_path: Path):
        merged = merge_ds_config(as_default(tmp_path), OFFLOAD, 1)
        assert merged.config.optim.implementation == "auto"
        assert merged.ds_config["zero_force_ds_cpu_optimizer"] is False
        loaded = as_default(tmp_path, BASE, "optim.implementation=deepspeed-cpu")
        assert merge_ds_config(loaded, OFFLOAD, 1).ds_config["zero_force_ds_cpu_optimizer"] is True

    def test_an_explicit_force_asks_for_deepspeed(self, tmp_path: Path):
        ds = {**OFFLOAD, "zero_force_ds_cpu_optimizer": True}
        assert merge_ds_config(as_default(tmp_path), ds, 1).config.optim.implementation == "deepspeed-cpu"
        mine = as_default(tmp_path, BASE, "optim.implementation=torch-fused")
        with pytest.raises(
            UserError, match=r'^optim.implementation: "torch-fused" .*zero_force_ds_cpu_optimizer: true'
        ):
            merge_ds_config(mine, ds, 1)

    @pytest.mark.parametrize("implementation", ["fused", "apex", "deepspeed-fused"])
    def test_optimizers_of_the_gpu_are_refused(self, tmp_path: Path, implementation: str):
        loaded = as_default(tmp_path, BASE, f"optim.implementation={implementation}")
        with pytest.raises(UserError, match=f"optim.implementation: {implementation} steps on the GPU, but .*offload"):
            merge_ds_config(loaded, OFFLOAD, 1)

    def test_torch_adam_false_means_the_cpu_kernel_here(self, tmp_path: Path):
        ds = {**OFFLOAD, "optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
        assert merge_ds_config(as_default(tmp_path), ds, 1).config.optim.implementation == "deepspeed-cpu"

    def test_none_is_no_offload(self, tmp_path: Path):
        ds = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}
        assert "zero_force_ds_cpu_optimizer" not in merge_ds_config(as_default(tmp_path), ds, 1).ds_config

    def test_at_stage_0_it_warns(self, tmp_path: Path):
        ds = {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
        (warning,) = merge_ds_config(as_default(tmp_path), ds, 1).warnings
        assert warning.startswith("zero_optimization.offload_optimizer: has no effect at ZeRO stage 0; set stage 1, 2")

    def test_parameters_are_offloaded_at_stage_3_only(self, tmp_path: Path):
        zero = {"stage": 2, "offload_param": {"device": "cpu"}}
        (warning,) = merge_ds_config(as_default(tmp_path), {"zero_optimization": zero}, 1).warnings
        assert warning.startswith("zero_optimization.offload_param: has no effect at ZeRO stage 2; set stage 3")
        assert not merge_ds_config(as_default(tmp_path), {"zero_optimization": zero | {"stage": 3}}, 1).warnings

    @pytest.mark.parametrize("block", ["activation_checkpointing", "compile"])
    def test_blocks_of_functions_that_are_not_called_warn(self, tmp_path: Path, block: str):
        (warning,) = merge_ds_config(as_default(tmp_path), {block: {}}, 1).warnings
        assert warning.startswith(f"{block}: has no effect on megadit's models; set train.{block}")
