"""Every value of configs/mmdit against the paper (arXiv 2505.15270, section 5.2), and what the paper does not say."""

from __future__ import annotations

from typing import Any

import pytest

from megadit.config import ModelConfig, ParallelConfig, load
from megadit.config.loading.sources import configs_dir
from megadit.models import count_parameters

# file: width, heads, parametrization, lr, clip, steps, billions of parameters without REPA's projector
LAYOUT_18B: dict[str, Any] = {"tensor": 2, "pipeline": 8, "sequence": True}
PAPER: dict[str, tuple[int, int, str, float, float, int, float]] = {
    "18b-mup": (5120, 80, "mup", 2.5e-4, 1.0, 200_000, 18.11),
    "18b-sp": (5120, 80, "sp", 2e-4, 0.1, 200_000, 18.11),
    "proxy-mup": (512, 8, "mup", 2.5e-4, 1.0, 30_000, 0.183),
}

COMMON: dict[str, Any] = {
    "objective": {
        "kind": "flow", "prediction": "eps", "diffusion_steps": 1000, "beta_schedule": "linear",
        "time_sampling": "uniform", "weighting": "none",
        "label_dropout": 0.1, "logit_mean": 0.0, "logit_std": 1.0, "shift": 1.0, "min_snr_gamma": 5.0,
        "repa_weight": 0.5,
    },
    "data": {
        "name": "webdataset", "path": None, "image_size": 256, "condition": "text", "flip": False, "crop": "adm",
        "val_fraction": 0.001, "skin_tones": False, "classes": None, "on_change": "refuse", "on_corrupt": "stop",
        "options": {}, "max_missing_captions": 0.5,
        "workers": 4, "vae": {"path": None, "scale": None, "shift": None, "factor": 8},
        "features": {"encoder": "stored", "path": None, "image_size": 128, "cache": None},
        "text": {
            "encoder": "t5", "path": None, "pooled": "none", "pooled_path": None, "precision": "fp32", "cache": None,
        },
    },
    "ema": {"decays": (0.9999,), "sigma_rels": (), "every": 1},
    "sample": {
        "scheduler": "euler", "steps": 50, "guidance": 4.0, "guidance_channels": None, "count": 16, "seed": 0,
        "weights": "0.9999", "prompts": (),
    },
    "plugins": (),
}  # fmt: skip
ROLES = ("input", "hidden", "vector", "output", "finite")


def test_these_are_all_the_files():
    assert {path.stem for path in (configs_dir() / "mmdit").glob("[!_]*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_every_value(name: str):
    width, heads, parametrization, lr, clip, steps, _ = PAPER[name]
    mup = parametrization == "mup"
    assert load(configs_dir() / "mmdit" / f"{name}.yaml").config.model_dump() == COMMON | {
        "parallel": ParallelConfig(**({} if name == "proxy-mup" else LAYOUT_18B)).model_dump(),
        "kernels": {
            "norm_modulate": "auto", "residual_across_blocks": "auto", "swiglu": "auto", "noise": "auto",
            "qk_norm": "auto", "gelu": "auto", "attention": "auto",
        },
        "model": {
            "family": "mmdit", "options": {}, "width": width, "depth": 16, "heads": None if mup else heads,
            "head_dim": 64 if mup else None, "patch_size": 2, "in_channels": 16, "input_size": 32, "learn_sigma": False,
            "mlp": "swiglu", "mlp_ratio": 4.0, "qk_norm": "rms", "num_classes": 0, "qkv_bias": True,
            "text": {"dim": 4096, "max_length": 120, "pooled_dim": 0, "mask": True},
            "repa": {"block": 8, "feature_dim": 768, "hidden": 2048, "norm": "none"},
            "pos_scale": 1.0, "pos_embed_max_size": None, "conv": True, "mlp_time_embed": False,
            "attention_precision": "auto", "norm_precision": "auto",
            "parametrization": parametrization, "base_width": 1920 if mup else None, "output_mult": 1.0,
            "init": "auto", "adaln_init": "auto",
            "role_hps": {role: {"mult": 1.0, "init_std": 1.0, "lr": 1.0} for role in ROLES},
        },
        "optim": {
            "lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "eps_mode": "constant", "weight_decay": 0.0,
            "wd_mode": "independent", "wd_vectors": False, "implementation": "auto", "schedule": "constant",
            "warmup_steps": 1000, "decay_steps": None, "min_lr_ratio": 0.0, "clip": {
                "mode": "global", "value": clip,
                "groups": {"input": None, "hidden": None, "vector": None, "output": None, "finite": None},
            },
        },
        "train": {
            "steps": steps, "epochs": None, "global_batch": 4096, "micro_batch": None, "precision": "bf16", "seed": 0,
            "tf32": "auto", "fp8": {"backend": "torch", "scaling": "tensor", "bf16_layers": ()},
            "activation_checkpointing": "none", "compile": False,
            "log_every": 100, "checkpoint_every": 5000, "keep_last": 2, "keep_every": None, "skip_samples": (),
            "init_from": None, "init_from_ema": None, "sample_every": None,
            "validate_every": 10_000, "validation_images": 4096, "validate_with": ("online",), "tensorboard": True,
            "wandb": False, "callbacks": (),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_sizes(name: str):
    model = load(configs_dir() / "mmdit" / f"{name}.yaml").config.model
    bare = ModelConfig(**{**model.model_dump(), "repa": None})
    assert count_parameters(bare) == pytest.approx(PAPER[name][-1] * 1e9, rel=0.005)
    assert model.num_heads == PAPER[name][1] and model.head_channels == 64
