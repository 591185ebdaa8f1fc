"""Configurations and DeepSpeed files: whatever stands in one is taken, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from helpers.fuzz.hunt import YAML_WORDS, efforts, hunt, json_bytes, mutated, odd_json, odd_values
from helpers.training import small_config
from megadit.config import RunConfig
from megadit.config.deepspeed.file import is_known_valid
from megadit.config.deepspeed.merge import merge_ds_config
from megadit.config.loading.loader import load, to_yaml
from megadit.config.loading.sources import configs_dir
from megadit.config.schema.parallel import layout_problem


def _values() -> list[dict[str, Any]]:
    """Configurations with every key, of each family's shape."""
    return [
        small_config().model_dump(mode="json"),
        *(
            load(name).config.model_dump(mode="json")
            for name in ("quickstart/emoji-mmdit.yaml", "quickstart/emoji-pixart.yaml")
        ),
    ]


@efforts
def test_a_config_file(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    shipped = [path.read_bytes() for path in sorted((configs_dir() / "quickstart").glob("*.yaml"))]
    whole = [to_yaml(small_config()).encode()]
    (tmp_path / "base.yaml").write_bytes(whole[0])

    def read(data: bytes) -> None:
        file.write_bytes(data)
        config = load(file).config
        layout_problem(config.parallel, config.model)
        assert load_again(config, tmp_path) == config

    hunt(effort, mutated([*shipped, *whole], YAML_WORDS), read)


@efforts
def test_odd_values_in_a_config(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"

    def read(values: Any) -> None:
        file.write_bytes(json_bytes(values))  # a part of YAML
        config = load(file).config
        layout_problem(config.parallel, config.model)
        assert load_again(config, tmp_path) == config

    hunt(
        effort,
        odd_values(_values(), extra=("2^-10", "auto", "adm", "text", "2^999", "5%", ".5", "1e-400")),
        read,
        quick=11,
    )


def load_again(config: RunConfig, folder: Path) -> RunConfig:
    again = folder / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    return load(again).config


@efforts
def test_overrides_on_a_command_line(effort: str) -> None:
    keys = [
        "model.width",
        "model",
        "optim.lr",
        "optim.clip",
        "data.classes",
        "ema.decays",
        "train",
        "train.steps",
        "",
        "a.b.c",
        "base",
        "model.preset",
    ]
    texts = st.one_of(
        st.text(max_size=20),
        mutated([b"2^-10", b"[0.9, 0.95]", b"{mode: global, value: 1}", b"null", b"xl-2"], YAML_WORDS).map(
            lambda b: b.decode("utf-8", "surrogateescape")
        ),
    )
    override = st.builds(lambda key, text: f"{key}={text}", st.sampled_from(keys), texts)

    def read(overrides: list[str]) -> None:
        load("quickstart/digits.yaml", overrides)

    hunt(effort, st.lists(st.one_of(override, override, st.text(max_size=10)), min_size=1, max_size=3), read)


DS_FILES: list[dict[str, Any]] = [
    {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-4, "warmup_num_steps": 10},
        },
    },
    {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 100,
            "hysteresis": 2,
        },
        "optimizer": {"type": "MuAdamW", "params": {"lr": "auto"}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 100, "warmup_num_steps": 10, "cos_min_ratio": 0.1},
        },
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": True},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "bf16",
        "prescale_gradients": False,
    },
]


@efforts
def test_a_deepspeed_file(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    loaded = load("quickstart/digits.yaml")
    shipped = [path.read_bytes() for path in sorted((configs_dir() / "deepspeed").glob("*.json"))]
    assert shipped

    def read(data: bytes) -> None:
        file.write_bytes(data)
        merged = merge_ds_config(loaded, file, 2)
        is_known_valid(merged.ds_config)

    hunt(
        effort,
        st.one_of(odd_json(DS_FILES, extra=("auto", "cpu", "nvme", "fp32", "bf16")), mutated(shipped)),
        read,
        quick=33,
    )
