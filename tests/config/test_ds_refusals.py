"""What a DeepSpeed file may not say: each refusal is one sentence with the key, the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadit.config import LoadedConfig, RunConfig, merge_ds_config
from megadit.config.deepspeed.file import KNOWN_KEYS, REFUSED_BLOCKS, ZERO_KEYS
from megadit.errors import UserError


def loaded(parametrization: str = "mup") -> LoadedConfig:
    model = {"width": 64, "head_dim": 16, "parametrization": parametrization, "base_width": 64}
    return LoadedConfig(RunConfig.model_validate({"model": model, "train": {"steps": 10, "global_batch": 64}}))


def refused(ds: Any, world: int = 1, parametrization: str = "mup") -> str:
    with pytest.raises(UserError) as error:
        merge_ds_config(loaded(parametrization), ds, world)
    message = str(error.value)
    assert "\n" not in message
    return message


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


FLATTENS = "writes one learning rate into all parameter groups, which flattens the ratios of muP"


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        # schedulers
        (scheduler("WarmupLR", warmup_max_lr=0.001), f"scheduler.params.warmup_max_lr: 0.001 {FLATTENS}; leave it out"),
        (
            scheduler("WarmupDecayLR", total_num_steps=9),
            f"scheduler.type: WarmupDecayLR {FLATTENS}; take the block out",
        ),
        (
            scheduler("OneCycle"),
            f"scheduler.type: OneCycle {FLATTENS}; take the block out and use optim.schedule=cosine",
        ),
        (scheduler("LRRangeTest"), f"scheduler.type: LRRangeTest {FLATTENS}; take the block out and use a sweep over"),
        (scheduler("StepLR"), "scheduler.type: StepLR is not known; use WarmupLR or WarmupCosineLR, or take the block"),
        (scheduler("WarmupLR", warmup_min_lr=1e-6), "scheduler.params.warmup_min_lr: 1e-06 is not supported; the warm"),
        (scheduler("WarmupCosineLR", warmup_min_ratio=0.1), "scheduler.params.warmup_min_ratio: 0.1 is not supported"),
        (
            scheduler("WarmupLR", warmup_type="log"),
            'scheduler.params.warmup_type: "log" is not supported; set "linear"',
        ),
        (scheduler("WarmupLR", warmup_steps=3), "scheduler.params.warmup_steps: is not a parameter of WarmupLR; did"),
        (
            scheduler("WarmupLR", warmup_num_steps=2.5),
            "scheduler.params.warmup_num_steps: 2.5 is not a number of steps",
        ),
        (scheduler("WarmupCosineLR", cos_min_ratio="x"), 'scheduler.params.cos_min_ratio: "x" is not a number'),
        ({"scheduler": "WarmupLR"}, 'scheduler: "WarmupLR" is not an object of keys and values'),
        ({"scheduler": {"type": 3}}, 'scheduler: {"type": 3} is not {"type": NAME, "params": {…}}'),
        # optimizers
        (optimizer("Lamb"), "optimizer.type: Lamb has no muP rules in megadit; use AdamW, or take the optimizer block"),
        (optimizer("OneBitAdam"), "optimizer.type: OneBitAdam has no muP rules in megadit"),
        (optimizer("Muon"), "optimizer.type: Muon has no muP rules in megadit"),
        (optimizer("SGD"), "optimizer.type: SGD has no muP rules in megadit"),
        (optimizer("MuSGD"), "optimizer.type: MuSGD has no muP rules in megadit"),
        (optimizer("AdamW", lr="fast"), 'optimizer.params.lr: "fast" is not a number'),
        (optimizer("AdamW", lr=True), "optimizer.params.lr: true is not a number"),
        (optimizer("AdamW", betas=[0.9]), "optimizer.params.betas: [0.9] is not a list of two numbers"),
        (optimizer("AdamW", betas=[0.9, None]), "optimizer.params.betas: null is not a number"),
        (
            optimizer("AdamW", weigth_decay=1),
            "optimizer.params.weigth_decay: is not a parameter of AdamW; did you mean",
        ),
        (optimizer("AdamW", zzz=1), "optimizer.params.zzz: is not a parameter of AdamW; megadit translates lr, betas"),
        (
            optimizer("AdamW", max_grad_norm=1),
            "optimizer.params.max_grad_norm: DeepSpeed refuses it; set gradient_clip",
        ),
        (optimizer("AdamW", amsgrad=True), "optimizer.params.amsgrad: true is not supported; set false"),
        (
            optimizer("AdamW", bias_correction=False),
            "optimizer.params.bias_correction: false is not supported; set true",
        ),
        (
            optimizer("Adam", adam_w_mode=False, weight_decay=0.1),
            "optimizer.params.weight_decay: 0.1 would be added to the gradient under this optimizer; megadit decays",
        ),
        (optimizer("MuAdam", weight_decay=0.1), "optimizer.params.weight_decay: 0.1 would be added to the gradient"),
        # precision and stages
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            "bf16.enabled: true and fp16.enabled: true exclude each other; keep one",
        ),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled: "yes" is not true or false'),
        ({"bf16": True}, "bf16: true is not an object of keys and values"),
        (
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
            "parallel.zero_stage: 0 does not go with train.precision bf16, where DeepSpeed would start Adam at step 1",
        ),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "parallel.zero_stage: 0 does not go with"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads: true leaves no float32 master weights",
        ),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, 'data_types.grad_accum_dtype: "fp99" is not a type of DeepS'),
        ({"fp16": {"enabled": True, "auto_cast": True}}, "fp16.auto_cast: true rounds timesteps to half precision"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio: 0.5 hands a part of the update to an optimizer of DeepSpeed's",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload: true hands a part of the update",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4 is not 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: true is not 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage: "2" is not 0, 1, 2 or 3'),
        ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge: DeepSpeed has no such key; did you mean stage?"),
        ({"zero_optimization": {"zenflow": {"x": 1}}}, "zero_optimization.zenflow: it replaces the optimizer's step"),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm: false, but megadit",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device: nvme swaps out the master weights",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device: nvme swaps out the weights",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}} | optimizer("FusedAdam"),
            "optim.implementation: deepspeed-fused steps on the GPU, but zero_optimization.offload_optimizer keeps",
        ),
        # clipping and batches
        ({"gradient_clipping": -1}, "gradient_clipping: -1 is not at least 0"),
        ({"gradient_clipping": "1"}, 'gradient_clipping: "1" is not a number'),
        ({"train_batch_size": 0}, 'train_batch_size: 0 is not a whole number of at least 1, or "auto"'),
        ({"train_batch_size": 2.5}, 'train_batch_size: 2.5 is not a whole number of at least 1, or "auto"'),
        (
            {"gradient_accumulation_steps": True},
            "gradient_accumulation_steps: true is not a whole number of at least 1",
        ),
        # what changes gradients or needs parts that megadit has itself
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: sum would scale gradients by the ranks; set mean"),
        (
            {"managed_gradient_accumulation": False},
            "managed_gradient_accumulation: false is not supported; take it out",
        ),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2 is not supported; take it out"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: AutoTP replaces layers and drops their muP"),
        ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed 0.19 no longer has it; take it out"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency: megadit numbers and feeds the samples itself; take"),
    ],
)
def test_refusals(ds: dict[str, Any], message: str):
    said = refused(ds)
    assert said.startswith(message), said
    assert said.endswith("(in ds_config)") or "zero_stage" in said


def test_mu_adam_needs_a_mup_model():
    said = refused(optimizer("MuAdamW"), parametrization="sp")
    assert said.startswith("optimizer.type: MuAdamW needs a muP model, but model.parametrization is sp; set model.par")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ('{"a": 1,\n "b" 2}', "(line 2)"),
        ("[1]", "is not a JSON object; DeepSpeed files begin with {"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "has the key enabled twice; keep one"),
        (b"\xff\xfe", "is not a text file; give a DeepSpeed JSON file"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str | bytes, message: str):
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(path)
    assert said.startswith("--ds_config: ") and message in said


def test_missing_files():
    assert refused("zero9.json").startswith("--ds_config: no file zero9.json; did you mean configs/deepspeed/zero")
    assert refused("/tmp").startswith("--ds_config: /tmp is a folder; name a .json file in it")


def test_files_of_ours_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert merge_ds_config(loaded(), "deepspeed/zero3.json", 1).config.parallel.zero_stage == 3


def test_disabled_blocks_are_dropped():
    ds = {name: {"enabled": False} for name in REFUSED_BLOCKS} | {"tensor_parallel": {"autotp_size": 1}}
    merged = merge_ds_config(loaded(), ds, 1)
    assert not set(merged.ds_config) & set(REFUSED_BLOCKS)


def test_unknown_top_level_keys_are_warned_of():
    merged = merge_ds_config(loaded(), {"gradient_cliping": 1.0, "zzzz": 1}, 1)
    assert merged.warnings == (
        "gradient_cliping: DeepSpeed has no such key and ignores it; did you mean gradient_clipping? (in ds_config)",
        "zzzz: DeepSpeed has no such key and ignores it; it has no effect (in ds_config)",
    )
    assert merged.ds_config["gradient_clipping"] == 0.0


def test_the_old_name_of_bf16_works():
    assert merge_ds_config(loaded(), {"bfloat16": {"enabled": True}}, 1).config.train.precision == "bf16"


class TestAgainstDeepSpeed:
    """Our lists of keys are DeepSpeed's."""

    def test_zero_keys(self):
        zero = pytest.importorskip("deepspeed.runtime.zero.config")
        names = set()
        for name, field in zero.DeepSpeedZeroConfig.model_fields.items():
            names |= {name, field.alias} - {None}
        assert names >= ZERO_KEYS, ZERO_KEYS - names
        # Every documented spelling is known: the alias where there is one, else the name.
        spelled = {field.alias or name for name, field in zero.DeepSpeedZeroConfig.model_fields.items()}
        assert spelled <= ZERO_KEYS, spelled - ZERO_KEYS

    def test_top_level_keys_occur_in_its_source(self):
        package = Path(pytest.importorskip("deepspeed").__file__).parent
        folders = [
            "runtime",
            "datastates",
            "monitor",
            "comm",
            "profiling",
            "autotuning",
            "utils",
            "inference",
            "compile",
            "module_inject",
        ]
        files = [file for folder in folders if (package / folder).is_dir() for file in (package / folder).rglob("*.py")]
        text = "\n".join(file.read_text() for file in files)
        missing = {key for key in KNOWN_KEYS if f'"{key}"' not in text and f"'{key}'" not in text}
        assert not missing

    def test_removed_blocks_are_refused(self):
        config = pytest.importorskip("deepspeed.runtime.config")
        assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED_BLOCKS)
        assert not set(config._REMOVED_ZERO_CONFIG_KEYS) & ZERO_KEYS

    def test_its_own_warmup_type_default_is_not_ours(self):
        # Absent means "from the run configuration", which is linear; only an explicit "log" is refused.
        merged = merge_ds_config(loaded(), scheduler("WarmupLR", warmup_num_steps=5), 1)
        assert merged.config.optim.warmup_steps == 5

    def test_json_stays_json(self):
        json.dumps(merge_ds_config(loaded(), None, 1).ds_config)
