"""Every value of configs/uvit that its authors give (baofff/U-ViT, configs/), and that the files make their models."""

from __future__ import annotations

import pytest

from megadit.config import load_config
from megadit.config.loading.sources import configs_dir
from megadit.models import count_parameters

# file: parameters, betas, warm-up, steps, batch
AUTHORS: dict[str, tuple[int, tuple[float, float], int, int, int]] = {
    "cifar-s-2": (44_255_328, (0.99, 0.999), 2500, 500_000, 128),
    "l-2": (286_763_172, (0.99, 0.99), 5000, 300_000, 1024),
    "l-2-mup": (286_763_172, (0.99, 0.99), 5000, 300_000, 1024),
    "proxy-256-mup": (18_213_540, (0.99, 0.99), 5000, 300_000, 1024),
}


def test_these_are_all_the_files() -> None:
    assert {path.stem for path in (configs_dir() / "uvit").glob("[!_]*.yaml")} == set(AUTHORS)


@pytest.mark.parametrize("name", AUTHORS)
def test_values(name: str) -> None:
    parameters, betas, warmup, steps, batch = AUTHORS[name]
    config = load_config(f"uvit/{name}.yaml")
    assert count_parameters(config.model) == parameters
    optim, train, mup = config.optim, config.train, name.endswith("mup")
    assert (optim.betas, optim.warmup_steps, optim.weight_decay, optim.wd_vectors) == (betas, warmup, 0.03, True)
    assert (train.steps, train.global_batch, optim.schedule, optim.clip.value) == (steps, batch, "constant", None)
    assert (optim.lr, optim.wd_mode) == ((2.0**-10, "constant") if mup else (2e-4, "independent"))
    assert config.model.base_width == (256 if mup else None)
    assert config.model.head_channels == 64 and config.model.mlp == "gelu" and not config.model.qkv_bias
    assert (config.objective.kind, config.ema.decays, config.sample.weights) == ("ddpm", (0.9999,), "0.9999")
    latents = name != "cifar-s-2"
    assert config.objective.beta_schedule == ("scaled_linear" if latents else "linear")
    assert config.objective.label_dropout == (0.15 if latents else 0.1)  # without labels it drops nothing
    assert (config.data.vae is not None, config.sample.guidance) == (latents, 1.4 if latents else 1.0)


def test_the_quickstart_is_the_emoji_run_of_another_family() -> None:
    ours, dit = (load_config(f"quickstart/{name}.yaml") for name in ("emoji-uvit", "emoji"))
    changed = {"family": "uvit", "mlp": "gelu", "qkv_bias": False, "depth": ours.model.depth}
    assert ours.model == dit.model.model_copy(update=changed)
    assert ours.model_copy(update={"model": dit.model}) == dit
