"""Every value of configs/pixart against the paper (arXiv 2505.15270) and the original's settings."""

from __future__ import annotations

import math

import pytest

from megadit.config import load, load_config
from megadit.config.sources import configs_dir
from megadit.models import count_parameters

# file: width, heads, parametrization, lr, batch, epochs, steps between checkpoints, millions of parameters
PAPER: dict[str, tuple[int, int, str, float, int, float, int, float]] = {
    "baseline": (1152, 16, "sp", 9.38e-5, 176 * 32, 30, 20_000, 610.9),
    "target-mup": (1152, 16, "mup", 2**-10, 176 * 32, 30, 20_000, 610.9),
    "proxy-mup": (288, 4, "mup", 2**-10, 176 * 8, 5, 10_000, 39.2),
}
ROLES = ("input", "hidden", "vector", "output", "finite")


def test_these_are_all_the_files() -> None:
    assert {path.stem for path in (configs_dir() / "pixart").glob("[!_]*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_every_value(name: str) -> None:
    width, heads, parametrization, lr, batch, epochs, every, _ = PAPER[name]
    mup = parametrization == "mup"
    assert load_config(configs_dir() / "pixart" / f"{name}.yaml").model_dump() == {
        "model": {
            "family": "pixart", "width": width, "depth": 28, "heads": None if mup else heads,
            "head_dim": 72 if mup else None, "patch_size": 2, "in_channels": 4, "input_size": 32, "learn_sigma": True,
            "mlp": "gelu_tanh", "mlp_ratio": 4.0, "qk_norm": "none", "num_classes": 0, "qkv_bias": True,
            "text": {"dim": 4096, "max_length": 120, "pooled_dim": 0}, "repa": None, "pos_scale": 1.0,
            "pos_embed_max_size": None, "conv": True, "mlp_time_embed": False,
            "attention_precision": "fp32", "norm_precision": "auto",
            "parametrization": parametrization, "base_width": 288 if mup else None, "output_mult": 1.0,
            "init": "auto", "adaln_init": "auto",
            "role_hps": {role: {"mult": 1.0, "init_std": 1.0, "lr": 1.0} for role in ROLES},
        },
        "objective": {
            "kind": "ddpm", "prediction": "eps", "diffusion_steps": 1000, "time_sampling": "uniform",
            "weighting": "none", "label_dropout": 0.1, "logit_mean": 0.0, "logit_std": 1.0, "shift": 1.0,
            "min_snr_gamma": 5.0, "repa_weight": 0.0,
        },
        "data": {
            "name": "webdataset", "path": None, "image_size": 256, "condition": "text", "flip": False,
            "val_fraction": 0.001, "skin_tones": False, "classes": None, "workers": 10,
            "vae": {"path": None, "scale": 0.18215, "shift": None, "factor": 8}, "features": None,
            "text": {
                "encoder": "t5", "path": None, "pooled": "none", "pooled_path": None, "precision": "fp32",
                "cache": None,
            },
        },
        "optim": {
            "lr": lr, "betas": (0.9, 0.999), "eps": 1e-10, "eps_mode": "constant", "weight_decay": 0.03,
            "wd_mode": "independent", "wd_vectors": True, "implementation": "auto", "schedule": "constant",
            "warmup_steps": 1000, "decay_steps": None, "min_lr_ratio": 0.0, "clip": {
                "mode": "global", "value": 0.01, "groups": dict.fromkeys(ROLES),
            },
        },
        "ema": {"decays": (0.9999,), "sigma_rels": (), "every": 1},
        "parallel": {"tensor": 1, "sequence": False, "zero_stage": None},
        "train": {
            "steps": None, "epochs": epochs, "global_batch": batch, "micro_batch": None, "precision": "bf16",
            "seed": 43, "activation_checkpointing": "full", "compile": False,
            "log_every": 20, "checkpoint_every": every, "keep_last": 2, "keep_every": None,
            "init_from": None, "init_from_ema": None, "sample_every": None,
            "validate_every": every, "validation_images": 1024, "validate_with": ("online",), "tensorboard": True,
            "wandb": False,
        },
        "sample": {
            "scheduler": "dpm", "steps": 20, "guidance": 4.5, "guidance_channels": None, "count": 16, "seed": 0,
            "weights": "online", "prompts": (),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_heads_of_72_channels_and_size(name: str) -> None:
    model = load_config(f"pixart/{name}.yaml").model
    assert (model.num_heads, model.head_channels) == (PAPER[name][1], 72)
    assert round(count_parameters(model) / 1e6, 1) == PAPER[name][-1]


def test_the_baselines_rate_follows_the_originals_rule() -> None:
    """2e-5 at batch 256, by the square root of the batch."""
    assert load_config("pixart/baseline.yaml").optim.lr == pytest.approx(2e-5 * math.sqrt(176 * 32 / 256), rel=1e-3)


def test_the_quickstart_is_a_small_text_to_image_mup_flow_run() -> None:
    config = load(configs_dir() / "quickstart" / "emoji-pixart.yaml").config
    assert (config.data.name, config.data.condition, config.data.text.encoder) == ("emoji", "text", "minilm")
    assert config.model.family == "pixart" and config.model.parametrization == "mup"
    assert config.objective.kind == "flow" and config.train.precision == "fp32"
    assert config.model.text is not None and config.model.text.dim == 384
