"""A walk over every key of a configuration: read by what was chosen, or refused; none that nothing reads."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any, get_args

import pytest

from megadit.config import RunConfig, load, merge_ds_config
from megadit.config.loading.layers import merge
from megadit.config.loading.sources import configs_dir, override_layer, read_layers
from megadit.config.schema.reads import READ_WHERE, ReadCondition, drop_unread, read_conditions
from megadit.config.schema.registered import registered_names
from megadit.config.schema.section import options, section_of, walk
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FIELDS = dict(walk(RunConfig))
LEAVES = [key for key, field in FIELDS.items() if section_of(field.annotation) is None]

# Keys that every run reads, with who does: a new key of the schema is entered here or in READ_WHERE.
ALWAYS = {
    "the model, whatever its family": (
        "model.family model.width model.depth model.heads model.head_dim model.patch_size model.in_channels "
        "model.input_size model.learn_sigma model.mlp model.mlp_ratio model.qk_norm model.attention_precision "
        "model.norm_precision model.qkv_bias model.num_classes"
    ),
    "the model of a plugin's family; every other refuses them": "model.options",
    "the model, where the section is given; a family without text or a weight of 0 refuses the section": (
        "model.text.dim model.text.max_length model.text.pooled_dim model.text.mask model.repa.block "
        "model.repa.feature_dim model.repa.hidden model.repa.norm"
    ),
    "the start and the rates of its parameters; a role that the model lacks refuses its factor": (
        "model.parametrization model.output_mult model.init model.role_hps.input.mult model.role_hps.input.init_std "
        "model.role_hps.input.lr model.role_hps.hidden.mult model.role_hps.hidden.init_std model.role_hps.hidden.lr "
        "model.role_hps.vector.mult model.role_hps.vector.init_std model.role_hps.vector.lr "
        "model.role_hps.output.mult model.role_hps.output.init_std model.role_hps.output.lr "
        "model.role_hps.finite.mult model.role_hps.finite.init_std model.role_hps.finite.lr"
    ),
    "the objective": "objective.kind objective.repa_weight",
    "a data source that declares options; others refuse them": "data.options",
    "every source of images": (
        "data.name data.image_size data.condition data.classes data.flip data.val_fraction data.workers data.on_change "
        "data.on_corrupt"
    ),
    "the codec; for stored latents without a path they are compared with what the tars say": (
        "data.vae.path data.vae.scale data.vae.shift data.vae.factor"
    ),
    "the optimizer": (
        "optim.lr optim.betas optim.eps optim.weight_decay optim.wd_vectors optim.implementation optim.schedule "
        "optim.warmup_steps optim.clip.mode optim.clip.value"
    ),
    "the averages": "ema.decays ema.sigma_rels",
    "the fused operations that the model calls": (
        "kernels.norm_modulate kernels.swiglu kernels.noise kernels.qk_norm kernels.gelu "
        "kernels.attention"
    ),
    "the blocks, whatever the family": "kernels.residual_across_blocks",
    "the layout of processes": (
        "parallel.tensor parallel.pipeline parallel.sequence parallel.zero_stage parallel.timeout_s "
        "parallel.rendezvous_timeout_s"
    ),
    "the loop": (
        "train.steps train.epochs train.global_batch train.micro_batch train.precision train.tf32 "
        "train.activation_checkpointing train.compile train.seed train.log_every train.checkpoint_every "
        "train.keep_last train.keep_every "
        "train.init_from train.skip_samples train.sample_every train.validation_images train.tensorboard train.wandb "
        "train.callbacks"
    ),
    "the start of the command, before anything else of a configuration": "plugins",
    "pictures; at guidance 1 the run keeps guidance_channels for launch/sample.py --guidance": (
        "sample.scheduler sample.steps sample.guidance sample.guidance_channels sample.count sample.seed "
        "sample.weights"
    ),
}  # fmt: skip
READ_BY_ALL = [key for keys in ALWAYS.values() for key in keys.split()]
CONDITIONAL = [key for key in LEAVES if read_conditions(key)]

# A value that is not the default, where the kind of the field does not tell one.
OTHER = {
    "objective.label_dropout": "0.2",
    "optim.decay_steps": "3",
    "optim.min_lr_ratio": "0.2",
    "train.fp8.scaling": "row",
    "train.validate_with": "[online, '0.9']",
    "train.init_from_ema": "'0.9'",
}
# Values that fulfil a condition, and values that do not, where no list of names tells.
ON_AND_OFF = {
    "objective.repa_weight": ("0.5", "0"),
    "train.validation_images": ("8", "0"),
    "data.val_fraction": ("0.1", "0"),
    "train.init_from": ("/run", "null"),
    "ema.decays": ("[0.9]", "[]"),
}
# A configuration of ours that fulfils a condition; all others are an override of DIGITS.
DIGITS = "quickstart/digits.yaml"
OURS = {
    ("model.family", "pixart"): "quickstart/emoji-pixart.yaml",
    ("model.family", "mmdit"): "quickstart/emoji-mmdit.yaml",
    ("model.family", "uvit"): "quickstart/emoji-uvit.yaml",
    ("data.condition", "text"): "quickstart/emoji-mmdit.yaml",
}
BESIDE = {
    ("data.condition", "none"): ["model.num_classes=0", "sample.guidance=1", "objective.label_dropout=0.1"],
    ("optim.clip.mode", "global"): ["optim.clip.value=1"],
}
OTHERWISE_TOLD = {"sample.prompts": "model.text"}  # which text as a condition needs


def other_value(key: str) -> str:
    """A value of ``key`` that is not its default, as an override is written."""
    if key in OTHER:
        return OTHER[key]
    field = FIELDS[key]
    for kind in options(field.annotation):
        named = [value for value in get_args(kind) if isinstance(value, str) and value != field.default]
        if named:
            return named[0]
        if kind is bool:
            return str(not field.default).lower()
        if kind in (int, float):
            return "2"
        if kind is str:
            return "/x"
        if get_args(kind) == (str, ...):
            return "[x]"
    raise AssertionError(f"enter a value of {key} in OTHER")


def sides(condition: ReadCondition) -> tuple[list[str], list[str]]:
    """The values of the condition's key under which a key is read, and those under which it is not."""
    if condition.key in ON_AND_OFF:
        on, off = ON_AND_OFF[condition.key]
        return [on], [off]
    known = registered_names(FIELDS[condition.key]) or get_args(FIELDS[condition.key].annotation)
    return [str(v) for v in known if condition.is_met(v)], [str(v) for v in known if not condition.is_met(v)]


def making(condition: ReadCondition, value: str) -> tuple[str, list[str]]:
    """A configuration and the overrides with which the condition's key has the value."""
    pair = (condition.key, value)
    if pair in OURS:
        return OURS[pair], [f"{condition.key}={value}"]
    return DIGITS, [f"{condition.key}={value}", *BESIDE.get(pair, [])]


def settled(config: str, overrides: list[str]) -> dict[str, Any]:
    """What the rule leaves of a configuration, whatever else may be wrong with it."""
    merged = merge([*layers(config), override_layer(overrides)], RunConfig)
    drop_unread(merged.values, merged.sources, merged.order, merged.resolved)
    return merged.values


@functools.cache
def layers(config: str) -> tuple[Any, ...]:
    return tuple(read_layers(configs_dir() / config))


def unread() -> list[tuple[str, ReadCondition, str]]:
    """Every key with every value of every condition under which it is not read, but for those of ``TestBaseWidth``."""
    hangs = [(key, condition) for key in CONDITIONAL for condition in read_conditions(key) if not condition.only_if_set]
    return [(key, condition, value) for key, condition in hangs for value in sides(condition)[1]]


def combined(key: str, held: ReadCondition, value: str) -> tuple[str, list[str]]:
    """As ``making``, with all other choices on which the key hangs made as it needs them."""
    config, overrides = making(held, value)
    for condition in read_conditions(key):
        if condition.key != held.key:
            file, more = making(condition, sides(condition)[0][0])
            config = config if config != DIGITS else file
            overrides += more
    return config, overrides


def test_every_key_is_classified_once() -> None:
    assert sorted(READ_BY_ALL) == sorted(set(LEAVES) - set(CONDITIONAL))


@pytest.mark.parametrize(("key", "condition", "value"), unread(), ids=lambda item: getattr(item, "key", str(item)))
def test_a_choice_that_does_not_read_it_refuses_it(key: str, condition: ReadCondition, value: str) -> None:
    config, overrides = making(condition, value)
    if condition != read_conditions(key)[0]:  # the first is told of first
        config, overrides = combined(key, condition, value)
    with pytest.raises(UserError) as raised:
        # A DeepSpeed file may still choose the schedule, so that one is judged with what it says.
        merge_ds_config(load(config, [*overrides, f"{key}={other_value(key)}"]), {}, 1)
    message = str(raised.value).partition("\n")[0]
    assert message.startswith((f"{key}: ", f"{key.rpartition('.')[0]}: "))
    named = OTHERWISE_TOLD.get(key, condition.key.rpartition(".")[2])
    assert named in message or value in message


@pytest.mark.parametrize("key", CONDITIONAL)
def test_every_choice_that_reads_it_takes_it(key: str) -> None:
    for condition in read_conditions(key):
        for value in sides(condition)[0]:
            config, overrides = combined(key, condition, value)
            assert key in settled(config, [*overrides, f"{key}={other_value(key)}"])


def test_averages_of_either_kind_read_how_often_they_follow() -> None:
    for averages in ("ema.decays=[0.9]", "ema.sigma_rels=[0.1]"):
        assert load(DIGITS, [averages, "ema.every=2"]).config.ema.every == 2


class TestBaseWidth:
    """It depends on a key that a later layer may still set: variants of a study are of both parametrizations."""

    def test_one_that_a_later_choice_overrules_stays_as_runs_and_studies_of_before_have_it(self) -> None:
        assert load(DIGITS, ["model.parametrization=sp"]).config.model.base_width == 64

    def test_one_asked_for_beside_sp_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"^model\.base_width: 32 is not read where model\.parametrization is sp;"):
            load("dit/xl-2.yaml", ["model.base_width=32"])

    def test_one_in_the_file_that_chooses_sp_stays_as_studies_of_before_have_it(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(
            "model: {family: dit, heads: 4, width: 64, base_width: 32, parametrization: sp}\ntrain: {steps: 2}\n",
            encoding="utf-8",
        )
        assert load(tmp_path / "c.yaml").config.model.base_width == 32

    def test_one_beside_no_choice_stays(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(
            "model: {family: dit, heads: 4, width: 64, base_width: 32}\ntrain: {steps: 2}\n", encoding="utf-8"
        )
        assert load(tmp_path / "c.yaml").config.model.base_width == 32
        assert load(tmp_path / "c.yaml", ["model.parametrization=mup"]).config.model.width_mult == 2


def test_something_outside_of_the_configuration_names_every_key() -> None:
    """What no module names as an attribute, nothing reads."""
    through = {  # read under the name of what holds them
        "ema.decays": "constant_decays",
        "ema.sigma_rels": "power_profiles",
        **{key: "groups" for key in LEAVES if key.startswith("optim.clip.groups.")},
        "model.options": "model",  # by the models of plugins
        **{key: "kernels" for key in LEAVES if key.startswith("kernels.")},  # tests/engine/test_kernels.py
    }
    folders = [ROOT / name for name in ("megadit", "launch", "tools")]
    named = {
        node.attr
        for path in (path for folder in folders for path in folder.rglob("*.py"))
        if ROOT / "megadit" / "config" not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert [key for key in LEAVES if through.get(key, key.rpartition(".")[2]) not in named] == []
    assert set(through) <= set(LEAVES) and "no_such_key" not in named


def test_the_table_has_no_key_that_hangs_on_itself_or_on_nothing() -> None:
    for key, choices in READ_WHERE.items():
        assert choices and key not in {condition.key for condition in choices}
