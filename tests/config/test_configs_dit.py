"""Every value of configs/dit against the paper (arXiv 2505.15270), and what each file leaves at its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadit.config import load, load_config
from megadit.config.loading.sources import configs_dir

# file: width, heads, parametrization, log2 or plain lr, steps
PAPER: dict[str, tuple[int, int, str, float, int]] = {
    "xl-2": (1152, 16, "sp", 1e-4, 7_000_000),
    "xl-2-mup": (1152, 16, "mup", 2**-10, 2_400_000),
    "proxy-144-mup": (144, 2, "mup", 2**-10, 200_000),
    "proxy-288-mup": (288, 4, "mup", 2**-10, 200_000),
    "proxy-576-mup": (576, 8, "mup", 2**-10, 200_000),
}

COMMON: dict[str, Any] = {
    "objective": {
        "kind": "ddpm", "prediction": "eps", "diffusion_steps": 1000, "beta_schedule": "linear",
        "time_sampling": "uniform", "weighting": "none",
        "label_dropout": 0.1, "logit_mean": 0.0, "logit_std": 1.0, "shift": 1.0, "min_snr_gamma": 5.0,
        "repa_weight": 0.0,
    },
    "data": {
        "name": "image-folder", "path": None, "image_size": 256, "condition": "class", "flip": True, "crop": "adm",
        "val_fraction": 0.0, "skin_tones": False, "classes": None, "on_change": "refuse", "on_corrupt": "stop",
        "options": {}, "max_missing_captions": 0.5,
        "workers": 4, "vae": {"path": None, "scale": 0.18215, "shift": None, "factor": 8}, "features": None,
        "text": {"encoder": "minilm", "path": None, "pooled": "none", "pooled_path": None, "precision": "fp32",
                 "cache": None},
    },
    "ema": {"decays": (0.9999,), "sigma_rels": (), "every": 1},
    "parallel": {"tensor": 1, "pipeline": 1, "sequence": False, "zero_stage": None, "timeout_s": 1800.0,
                 "rendezvous_timeout_s": None},
    "sample": {
        "scheduler": "ddpm", "steps": 250, "guidance": 1.0, "guidance_channels": 3, "count": 64, "seed": 0,
        "weights": "0.9999", "prompts": (),
    },
    "kernels": {
        "norm_modulate": "auto", "residual_across_blocks": "auto", "swiglu": "auto", "noise": "auto", "qk_norm": "auto",
        "gelu": "auto", "attention": "auto",
    },
    "plugins": (),
}  # fmt: skip
ROLES = ("input", "hidden", "vector", "output", "finite")


def test_these_are_all_the_files():
    assert {path.stem for path in (configs_dir() / "dit").glob("[!_]*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_every_value(name: str):
    width, heads, parametrization, lr, steps = PAPER[name]
    mup = parametrization == "mup"
    assert load_config(configs_dir() / "dit" / f"{name}.yaml").model_dump() == COMMON | {
        "model": {
            "family": "dit", "options": {}, "width": width, "depth": 28, "heads": None if mup else heads,
            "head_dim": 72 if mup else None, "patch_size": 2, "in_channels": 4, "input_size": 32, "learn_sigma": True,
            "mlp": "gelu_tanh", "mlp_ratio": 4.0, "qk_norm": "none", "num_classes": 1000,
            "qkv_bias": True, "text": None, "repa": None, "pos_scale": 1.0, "pos_embed_max_size": None, "conv": True,
            "mlp_time_embed": False,
            "attention_precision": "auto", "norm_precision": "auto",
            "parametrization": parametrization, "base_width": 288 if mup else None, "output_mult": 1.0,
            "init": "auto", "adaln_init": "auto",
            "role_hps": {role: {"mult": 1.0, "init_std": 1.0, "lr": 1.0} for role in ROLES},
        },
        "optim": {
            "lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "eps_mode": "constant", "weight_decay": 0.0,
            "wd_mode": "independent", "wd_vectors": mup, "implementation": "auto", "schedule": "constant",
            "warmup_steps": 0, "decay_steps": None, "min_lr_ratio": 0.0, "clip": {
                "mode": "global", "value": None,
                "groups": {"input": None, "hidden": None, "vector": None, "output": None, "finite": None},
            },
        },
        "train": {
            "steps": steps, "epochs": None, "global_batch": 256, "micro_batch": None, "precision": "fp32", "seed": 0,
            "tf32": True, "fp8": {"backend": "torch", "scaling": "tensor", "bf16_layers": ()},
            "activation_checkpointing": "none", "compile": False,
            "log_every": 100, "checkpoint_every": 50_000, "keep_last": 2, "keep_every": None, "skip_samples": (),
            "init_from": None, "init_from_ema": None, "sample_every": None,
            "validate_every": None, "validation_images": 0, "validate_with": ("online",), "tensorboard": True,
            "wandb": False, "callbacks": (),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_heads_of_72_channels(name: str):
    model = load_config(f"dit/{name}.yaml").model
    assert (model.num_heads, model.head_channels) == (PAPER[name][1], 72)


def test_the_readme_names_every_file():
    text = (configs_dir() / "README.md").read_text()
    for path in configs_dir().rglob("[!_]*"):
        if path.suffix in (".yaml", ".json"):
            assert f"`{path.name}`" in text, path.name


@pytest.mark.parametrize("name", ["emoji", "digits"])
def test_quickstarts_are_small_mup_flow_runs(name: str):
    config = load(configs_dir() / "quickstart" / f"{name}.yaml").config
    assert config.data.name == name and config.data.path is None
    assert config.model.parametrization == "mup" and config.objective.kind == "flow"
    assert config.model.width <= 512 and config.train.precision == "fp32"


def test_comments_say_where_a_file_comes_from():
    for path in Path(configs_dir()).rglob("*.yaml"):
        assert path.read_text().startswith("#"), path
