"""Every value of configs/pixart against the paper (arXiv 2505.15270) and the original's settings."""

from __future__ import annotations

import math

import pytest

from megadit.config import load, load_config
from megadit.config.loading.sources import configs_dir
from megadit.models import count_parameters

# file: width, heads, parametrization, lr, batch, epochs, steps between checkpoints, millions of parameters
PAPER: dict[str, tuple[int, int, str, float, int, float, int, float]] = {
    "baseline": (1152, 16, "sp", 9.38e-5, 176 * 32, 30, 20_000, 610.9),
    "target-mup": (1152, 16, "mup", 2**-10, 176 * 32, 30, 20_000, 610.9),
    "proxy-mup": (288, 4, "mup", 2**-10, 176 * 8, 5, 10_000, 39.2),
}


def test_these_are_all_the_files() -> None:
    assert {path.stem for path in (configs_dir() / "pixart").glob("[!_]*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_every_value_that_is_no_default(name: str) -> None:
    width, heads, parametrization, lr, batch, epochs, every, _ = PAPER[name]
    shape = (
        {"parametrization": "mup", "base_width": 288, "head_dim": 72, "init": "authors"}
        if parametrization == "mup"
        else {"heads": heads}
    )
    assert load_config(configs_dir() / "pixart" / f"{name}.yaml").model_dump(exclude_defaults=True) == {
        "model": {
            "family": "pixart", "width": width, "depth": 28, "attention_precision": "fp32", "num_classes": 0,
            "text": {}, **shape,
        },
        "data": {
            "name": "webdataset", "image_size": 256, "condition": "text", "crop": "center", "val_fraction": 0.001,
            "workers": 10, "vae": {"scale": 0.18215}, "text": {"encoder": "t5"},
        },
        "optim": {
            "lr": lr, "eps": 1e-10, "weight_decay": 0.03, "wd_vectors": True, "warmup_steps": 1000,
            "clip": {"value": 0.01},
        },
        "ema": {"decays": (0.9999,)},
        "train": {
            "epochs": epochs, "global_batch": batch, "precision": "bf16", "seed": 43,
            "activation_checkpointing": "full", "log_every": 20, "checkpoint_every": every, "validate_every": every,
            "validation_images": 1024,
        },
        "sample": {"scheduler": "dpm", "steps": 20, "guidance": 4.5, "count": 16},
    }  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_defaults_that_the_paper_relies_on(name: str) -> None:
    config = load_config(f"pixart/{name}.yaml")
    model, objective, optim = config.model, config.objective, config.optim
    assert model.text is not None and (model.text.dim, model.text.max_length, model.text.pooled_dim) == (4096, 120, 0)
    assert (model.patch_size, model.in_channels, model.input_size, model.learn_sigma) == (2, 4, 32, True)
    assert (model.mlp, model.mlp_ratio, model.qk_norm, model.output_mult, model.pos_scale) == (
        "gelu_tanh",
        4,
        "none",
        1,
        1,
    )
    assert (objective.kind, objective.prediction, objective.diffusion_steps) == ("ddpm", "eps", 1000)
    assert (objective.label_dropout, objective.weighting) == (0.1, "none")
    assert (optim.betas, optim.schedule, optim.clip.mode) == ((0.9, 0.999), "constant", "global")
    assert (optim.eps_mode, optim.wd_mode) == ("constant", "independent")
    assert (config.sample.guidance_channels, config.sample.weights) == (None, "online")


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
