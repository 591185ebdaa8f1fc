"""Training from tars is training from memory: the same curve with any ranks, through a resume, on latents too."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.ranks import run_ranks
from helpers.training import small_config, train_rank
from megadit.config import DataConfig
from megadit.config.schema.run import RunConfig
from megadit.data.codecs.pca import fit_and_save
from megadit.data.shards.encoding import Encoding, encode_set
from megadit.data.shards.naming import Sharding
from megadit.data.shards.writing import make_shards

STEPS = 6
SHARDING = Sharding("digits", 500)


def losses(config: RunConfig, folder: Path, ranks: int, *more: object) -> tuple[list[float], str]:
    result = run_ranks(ranks, train_rank, config, str(folder), *more)[0]
    return result["losses"], result["saved"]


@pytest.mark.distributed
def test_images_in_tars_give_the_same_curve_on_two_ranks_and_through_a_resume(tmp_path: Path) -> None:
    make_shards(DataConfig(name="digits"), tmp_path / "tars", SHARDING)
    tars = small_config(data={"name": "webdataset", "path": str(tmp_path / "tars")})
    expected, _ = losses(small_config(), tmp_path / "memory", 1, STEPS)
    first, saved = losses(tars, tmp_path / "two", 2, STEPS // 2)
    resumed, _ = losses(tars, tmp_path / "two", 1, STEPS, saved)
    assert first + resumed == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == STEPS


@pytest.mark.distributed
def test_stored_latents_give_the_curve_of_latents_made_on_the_way(tmp_path: Path) -> None:
    fit_and_save(DataConfig(name="digits"), tmp_path / "codec", 2, 3, 1000)
    vae = {"path": str(tmp_path / "codec"), "factor": 2}
    encode_set(
        DataConfig.model_validate({"name": "digits", "vae": vae}), tmp_path / "tars", SHARDING, Encoding("float32")
    )
    model = {"in_channels": 3, "input_size": 4, "patch_size": 1}
    expected, _ = losses(small_config(model=model, data={"name": "digits", "vae": vae}), tmp_path / "a", 1, STEPS)
    stored = small_config(model=model, data={"name": "webdataset", "path": str(tmp_path / "tars")})
    assert losses(stored, tmp_path / "b", 1, STEPS)[0] == pytest.approx(expected, rel=1e-5)
