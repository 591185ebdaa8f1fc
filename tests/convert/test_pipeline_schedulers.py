"""Every key of a diffusers scheduler is carried over, refused or told; an export says nothing needless."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models.tiny_dit import tiny_dit
from megadit.config.schema.run import ObjectiveConfig, SampleConfig
from megadit.convert.diffusers import scheduler_keys
from megadit.convert.diffusers.scheduler_keys import DRAWING, SCHEDULERS, SWITCHED, TRAINING
from megadit.convert.diffusers.schedulers import objective_gap, read_objective, scheduler_json
from megadit.diffusion.objectives.ddpm import schedule_betas
from megadit.diffusion.sampling.schedulers import build_sampler
from megadit.errors import UserError
from megadit.files.json_fields import Fields
from megadit.models.conversion import diffusers_classes, diffusers_of

WHERE = "IN: 'p/scheduler/scheduler_config.json'"
PLAIN = tiny_dit(learn_sigma=False)
DDPM = {"kind": "ddpm", "prediction": "eps", "beta_schedule": "linear", "diffusion_steps": 1000}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def read(name: str, values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    return read_objective(Fields(values, WHERE), name, options.pop("model", PLAIN), **options)


@functools.cache
def signatures(folder: str) -> dict[str, dict[str, Any]]:
    """Defaults of every key of every class in a folder of the installed diffusers, read off its source."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        pytest.skip("diffusers is not installed")
    defaults: dict[str, dict[str, Any]] = {}
    for path in sorted((Path(spec.origin).parent / folder).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            if init is not None:
                names = [argument.arg for argument in init.args.args[1:]]
                values = [literal(value) for value in init.args.defaults]
                defaults[node.name] = dict(zip(names[len(names) - len(values) :], values, strict=True))
    return defaults


def literal(node: ast.expr) -> Any:
    if ast.unparse(node) == "-float('inf')":
        return -math.inf
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_key_of_the_installed_class_is_known_with_its_default(name: str) -> None:
    theirs = signatures("schedulers")[name]
    assert {key: SCHEDULERS[name].get(key, "missing") for key in theirs} == theirs
    assert not set(SCHEDULERS[name]) - set(theirs)
    assert set(theirs) <= {*TRAINING, *DRAWING}
    assert not set(TRAINING) & set(DRAWING)


@pytest.mark.parametrize(("name", "family"), diffusers_classes().items())
def test_every_key_of_the_installed_transformer_is_known_with_its_default(name: str, family: str) -> None:
    assert dict(diffusers_of(family).defaults) == signatures("models/transformers")[name]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_file_of_defaults_says_nothing_but_its_sampler(name: str) -> None:
    betas = {} if "shift" in SCHEDULERS[name] else {"beta_start": 1e-4, "beta_end": 0.02}
    objective, notes = read(name, {**SCHEDULERS[name], **betas, "_diffusers_version": "0.30.0"})
    assert objective == ({"kind": "flow", "shift": 1.0} if "shift" in SCHEDULERS[name] else DDPM)
    sampler = f"of its scheduler is left out what only draws (sample.* does so here): {name}"
    assert notes == ([] if name in scheduler_keys.SAMPLED_HERE else [sampler])


@pytest.mark.parametrize("key", sorted({key for keys in SCHEDULERS.values() for key in keys}))
def test_a_change_of_any_key_is_carried_refused_or_told(key: str) -> None:
    """No value of any key passes without a word and without an effect, where its switch is on."""
    special: dict[str, Any] = {"lambda_min_clipped": -5.1, "trained_betas": [0.1], "shift": 3.0, "flow_shift": 3.0}
    flow_first = sorted(SCHEDULERS, key=lambda name: "Flow" not in name)
    name = next(name for name in flow_first if key in SCHEDULERS[name])
    default = SCHEDULERS[name][key]
    others = {bool: not default, str: "another", int: 7, float: 0.3}
    value = special.get(key, others.get(type(default), "another"))
    if value == DRAWING.get(key, "none"):
        # What is done here needs no word; the other value is its class's default, and told of another class.
        name, value = "LMSDiscreteScheduler", default
    values: dict[str, Any] = {**({SWITCHED[key]: True} if key in SWITCHED else {})}
    if "shift" not in SCHEDULERS[name]:
        values |= {"beta_start": 1e-4, "beta_end": 0.02}
    if key == "flow_shift":
        values["prediction_type"] = "flow_prediction"
    try:
        objective, notes = read(name, {**values, key: value})
    except UserError as error:
        assert key in str(error) or SWITCHED.get(key) == "use_dynamic_shifting"
        return
    assert objective != read(name, values)[0] or any(f"{key}=" in note for note in notes), (objective, notes)


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prediction": "v", "beta_schedule": "scaled_linear"},
        {"kind": "flow", "shift": 3.0},
    ],
    ids=["eps", "v", "flow"],
)
def test_our_own_schedulers_come_back_without_a_word(family: str, values: dict[str, Any]) -> None:
    objective = ObjectiveConfig(**values)
    stored = scheduler_json(family, objective)
    settings, notes = read(stored["_class_name"], stored)
    assert ObjectiveConfig(**settings) == objective and notes == [] and objective_gap(objective) is None


@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_the_scheduler_of_a_flow_draws_what_the_sampler_here_does(family: str, steps: int) -> None:
    """Up to the whole numbers of steps that it tells the model; of order 2 the difference is some 30 times that."""
    diffusers = pytest.importorskip("diffusers")
    objective = ObjectiveConfig(kind="flow", shift=3.0)
    stored = scheduler_json(family, objective)
    theirs = getattr(diffusers, stored["_class_name"]).from_config(stored)
    theirs.set_timesteps(steps)
    ours = build_sampler(objective, SampleConfig(steps=steps), learn_sigma=False).scheduler
    first = torch.randn(64, generator=torch.Generator().manual_seed(1))
    ends = []
    for scheduler in (theirs, ours):
        x = first
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x * (1 + t / 1000)) + 0.3 * x * t / 1000, t, x).prev_sample
        ends.append(x)
    assert len(theirs.timesteps) == len(ours.timesteps)
    assert float((ends[0] - ends[1]).abs().max() / ends[1].abs().max()) < 3e-3


def test_published_files_say_nothing_needless() -> None:
    """DiT-XL/2's, PixArt-alpha's and Stable Diffusion 3's, and a flow on a solver as SANA has it."""
    dit = {"clip_sample": False, "steps_offset": 0, "set_alpha_to_one": True, "trained_betas": None}
    assert read("DDIMScheduler", dit, model=tiny_dit()) == (DDPM, [])
    pixart = {
        "algorithm_type": "dpmsolver++", "euler_at_final": False, "lambda_min_clipped": -math.inf, "solver_order": 2,
        "sample_max_value": 1.0, "thresholding": False, "use_karras_sigmas": False, "variance_type": None,
    }  # fmt: skip
    assert read("DPMSolverMultistepScheduler", pixart) == (DDPM, [])
    assert read("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}) == ({"kind": "flow", "shift": 3.0}, [])
    sana = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert read("DPMSolverMultistepScheduler", sana) == ({"kind": "flow", "shift": 3.0}, [])


def test_what_is_trained_alike_is_carried_over_and_drawing_is_told() -> None:
    values = {**LATENT, "prediction_type": "v_prediction", "steps_offset": 1, "skip_prk_steps": True, "made_up": 3}
    objective, notes = read("PNDMScheduler", {**values, "clip_sample": False, "sample_max_value": 2.0})
    assert objective == {**DDPM, "prediction": "v", "beta_schedule": "scaled_linear"}
    assert notes == [
        "of its scheduler is left out what only draws (sample.* does so here): PNDMScheduler, steps_offset=1",
        "of its scheduler are left out, since its class does not have them: made_up=3",
    ]
    betas = schedule_betas("linear", 1000).float().tolist()
    assert read("DDPMScheduler", {"trained_betas": betas, "clip_sample": False}) == (DDPM, [])
    assert read("DDPMScheduler", {"variance_type": "learned_range"}, model=tiny_dit()) == (DDPM, [])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr true, a noise schedule that ends"),
    ("HeunDiscreteScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ("DDIMScheduler", {"prediction_type": "sample"}, "has prediction_type 'sample', and models here predict one of"),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "has prediction_type 'flow_prediction'"),
    ("DDIMScheduler", {"prediction_type": None}, "has prediction_type null, which must be given"),
    ("DDPMScheduler", {"predict_epsilon": False}, "has predict_epsilon false"),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "has prediction_type 'epsilon', and use_flow_sigmas true"),
    ("DDIMScheduler", {"beta_start": "1e-4"}, "has beta_start '1e-4', which must be a finite number"),
    ("DDIMScheduler", {"beta_end": math.nan}, "has beta_end nan, which must be a finite number"),
    (
        "DDIMScheduler",
        {"beta_end": 0.03},
        "has beta_schedule 'linear' with beta_start 0.0001 and beta_end 0.03 at num_tr",
    ),
    (
        "DDIMScheduler",
        {"trained_betas": [0.1, 0.2]},
        "has trained_betas of 2 numbers at num_train_timesteps 1000, but the",
    ),
    ("DDIMScheduler", {"trained_betas": "linear"}, "has trained_betas 'linear', which must be a list"),
    ("DDIMScheduler", {"num_train_timesteps": None}, "has num_train_timesteps null"),
    ("DDIMScheduler", {"num_train_timesteps": 10**12}, "has num_train_timesteps 1000000000000, which must be a whole"),
    ("DDIMScheduler", {"num_train_timesteps": 3}, "at num_train_timesteps 3, but"),
    ("FlowMatchHeunDiscreteScheduler", {"num_train_timesteps": 500}, "has num_train_timesteps 500, and a model of a"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "has shift 0, which must be a number above 0"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": [3]}, r"has shift \[3\], which must be a finite number"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "has invert_sigmas true, a flow whose times run"),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, r"comes to objective.kind=flow obj.*=1\.\d+;"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "has timestep_type 'continuous', a model that is told"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "no output channels for a variance"),
    ("DDPMScheduler", {"variance_type": "learned"}, "a variance that is learned here is a learned_range"),
    ("LCMScheduler", {}, "is of a 'LCMScheduler', and how such a model was trained is not known here"),
    ("EDMEulerScheduler", {}, "is of a 'EDMEulerScheduler'"),
]


@pytest.mark.parametrize(("name", "values", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_no_run_can_be_configured_for_is_refused(name: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^IN: 'p/scheduler/scheduler_config\.json' .*{words}"):
        read(name, values)


def test_a_flow_with_a_variance_is_refused() -> None:
    with pytest.raises(UserError, match="its transformer has output channels for a variance"):
        read("FlowMatchEulerDiscreteScheduler", {}, model=tiny_dit())


def test_other_numbers_of_steps_mean_other_times_and_need_consent() -> None:
    objective = ObjectiveConfig(diffusion_steps=500)
    assert "is trained to be told 1000 t / 500" in str(objective_gap(objective))
    stored = scheduler_json("dit", objective)
    with pytest.raises(UserError, match="the numbers 0 to 499 of the steps, a model here .* --allow-inexact"):
        read("DDIMScheduler", stored)
    settings, notes = read("DDIMScheduler", stored, allow_inexact=True)
    assert ObjectiveConfig(**settings) == objective and "1000 t / 500" in notes[0]
