"""The objective of a run as a scheduler of diffusers, and back.

Every key of a ``scheduler_config.json`` is carried over, refused, or noted. Refused is what ``objective.*`` cannot say
of the training: another noise schedule, another prediction, other times. Noted is what concerns drawing alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import ObjectiveConfig
from megadit.convert.diffusers.scheduler_keys import DRAWING, SAMPLED_HERE, SCHEDULERS, STEPS, SWITCHED, TRAINING
from megadit.diffusion.objectives.ddpm import BETA_ENDS, beta_ends, schedule_betas
from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown
from megadit.models.conversion import diffusers_of
from megadit.models.conversion.key_maps import listed

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_FLOW_PREDICTION = "flow_prediction"
_SOLVER = "DPMSolverMultistepScheduler"
_ORDER_1 = {"algorithm_type": "dpmsolver++", "solver_order": 1}  # of a flow: Euler's method
_REMEDY = "for the weights alone, give IN/transformer, with the objective.* of its training or a --config"
# Keys that are looked at whatever the class; others about training concern a class that has them.
_ALWAYS = ("rescale_betas_zero_snr", "invert_sigmas", "timestep_type", "predict_epsilon", "num_train_timesteps")
_ALLOW = "--allow-inexact converts it all the same"


def objective_gap(objective: ObjectiveConfig) -> str | None:
    """Why no scheduler draws from a model of this objective as it was trained; None where one does."""
    if objective.kind == "ddpm" and objective.diffusion_steps != STEPS:
        steps = objective.diffusion_steps
        return (
            f"pipelines tell a model the numbers 0 to {steps - 1} of its steps, and one of "
            f"objective.diffusion_steps {steps} is trained to be told 1000 t / {steps}"
        )
    return None


def scheduler_json(family: str, objective: ObjectiveConfig) -> dict[str, Any]:
    """scheduler_config.json of the objective, without the version."""
    model = diffusers_of(family)
    if objective.kind == "flow" and not model.supports_flow:
        flow = {"use_flow_sigmas": True, "prediction_type": _FLOW_PREDICTION, "flow_shift": objective.shift}
        return {"_class_name": _SOLVER, "num_train_timesteps": STEPS, **flow, **_ORDER_1}
    if objective.kind == "flow":
        head = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": STEPS}
        return {**head, "shift": objective.shift}
    first, last = beta_ends(objective.beta_schedule, objective.diffusion_steps)
    head = {
        "_class_name": model.ddpm_scheduler,
        "num_train_timesteps": objective.diffusion_steps,
        "beta_start": first,
        "beta_end": last,
        "beta_schedule": objective.beta_schedule,
        "prediction_type": "v_prediction" if objective.prediction == "v" else "epsilon",
    }
    if model.ddpm_scheduler == _SOLVER:
        return {**head, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    return {**head, "clip_sample": False, "set_alpha_to_one": True}


def scheduler_notes(family: str, objective: ObjectiveConfig) -> list[str]:
    """What people should know of the scheduler of ``scheduler_json``."""
    if objective.kind != "flow" or diffusers_of(family).supports_flow:
        return []
    return [
        f"its pipeline cannot run FlowMatchEulerDiscreteScheduler: the scheduler is {_SOLVER} of order 1 with "
        f"use_flow_sigmas, which is Euler's method too but tells the model whole numbers of {STEPS} steps, where a "
        "sampler here tells fractions"
    ]


def read_objective(
    fields: Fields, name: str, model: ModelConfig, *, allow_inexact: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """``objective.*`` of a scheduler of the class ``name``, and what of its configuration is left out.

    Raises:
        UserError: the class is not known, a value is not of its type, or the training that it describes is none that
            a run here can be configured for.
    """
    defaults = SCHEDULERS.get(name)
    if defaults is None:
        known = ", ".join(kind.removesuffix("Scheduler") for kind in SCHEDULERS)
        raise UserError(
            f"{fields.where} is of a {shown(name)}, and how such a model was trained is not known here (known are "
            f"{known}); {_REMEDY}"
        )
    scheduler = _SchedulerConfig(fields, name, defaults, allow_inexact)
    objective = scheduler.objective()
    scheduler.check_variance(model, flow=objective["kind"] == "flow")
    if objective["kind"] == "flow" and "use_dynamic_shifting" in defaults and scheduler.flag("use_dynamic_shifting"):
        raise scheduler.refused("use_dynamic_shifting", True, _dynamic_shift(scheduler, model))
    return objective, [*scheduler.notes, *_left_out(fields, name, defaults)]


class _SchedulerConfig:
    """One scheduler's keys about training, each with the default of its class."""

    def __init__(self, fields: Fields, name: str, defaults: Mapping[str, Any], allow_inexact: bool) -> None:
        self.fields, self.name, self.defaults, self.allow_inexact = fields, name, defaults, allow_inexact
        self.notes: list[str] = []

    def flag(self, key: str) -> bool:
        return self.fields.flag(key, False)

    def number(self, key: str, above: float = -math.inf) -> float:
        return self.fields.number(key, self.defaults.get(key, 1.0), above=above)

    def refused(self, key: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.fields.where} has {key} {shown(value)}, {why}; {_REMEDY}")

    def objective(self) -> dict[str, Any]:
        """The objective that the keys say. Raises UserError for one that cannot be said."""
        steps = self.fields.integer("num_train_timesteps", STEPS, least=1, most=10**6)
        for key in ("rescale_betas_zero_snr", "invert_sigmas"):
            if self.flag(key):
                meaning = (
                    "a noise schedule that ends at no signal at all, which objective.beta_schedule does not have"
                    if key == "rescale_betas_zero_snr"
                    else "a flow whose times run from noise to data, and here they run from data to noise"
                )
                raise self.refused(key, True, meaning)
        kind = self.fields.text("timestep_type", "discrete")
        if kind != "discrete":
            raise self.refused("timestep_type", kind, "a model that is told the logarithm of the noise, not a step")
        if "shift" in self.defaults:
            return self._flow(steps, "shift")
        prediction = self.fields.text("prediction_type", "epsilon")
        if not self.fields.flag("predict_epsilon", True):  # of versions before prediction_type
            raise self.refused("predict_epsilon", False, "a model that predicts the image, and none does here")
        of_flow = self.flag("use_flow_sigmas") and "use_flow_sigmas" in self.defaults
        if of_flow and prediction == _FLOW_PREDICTION:
            return self._flow(steps, "flow_shift")
        if of_flow:
            raise self.refused("prediction_type", prediction, "and use_flow_sigmas true, a mixture not known here")
        if prediction not in _PREDICTIONS:
            known = ", ".join(_PREDICTIONS)
            raise self.refused("prediction_type", prediction, f"and models here predict one of {known}, or a flow")
        return {"kind": "ddpm", "prediction": _PREDICTIONS[prediction], **self._noise(steps)}

    def check_variance(self, model: ModelConfig, *, flow: bool) -> None:
        """Raise UserError where the scheduler and the transformer's outputs do not go together."""
        variance = self.fields.text("variance_type", None, null=True)
        if variance == "learned":
            raise self.refused("variance_type", variance, "and a variance that is learned here is a learned_range")
        if variance == "learned_range" and not model.learn_sigma:
            raise self.refused("variance_type", variance, "but its transformer has no output channels for a variance")
        if flow and model.learn_sigma:
            raise UserError(
                f"{self.fields.where} is of flow matching, but its transformer has output channels for a variance, "
                f"which a velocity does not have; {_REMEDY}"
            )

    def _flow(self, steps: int, key: str) -> dict[str, Any]:
        if steps != STEPS:
            raise self.refused("num_train_timesteps", steps, f"and a model of a flow is told times to {STEPS} here")
        return {"kind": "flow", "shift": self.number(key, above=0.0)}

    def _noise(self, steps: int) -> dict[str, Any]:
        """``objective.beta_schedule`` and ``diffusion_steps``. Raises UserError for another schedule."""
        name = self._schedule(steps)
        if steps != STEPS:
            gap = (
                f"{self.fields.where} has num_train_timesteps {steps}: diffusers tells its model the numbers 0 to "
                f"{steps - 1} of the steps, a model here is told 1000 t / {steps}"
            )
            if not self.allow_inexact:
                raise UserError(f"{gap}; {_REMEDY}; {_ALLOW}, for a pipeline that came from here")
            self.notes.append(gap)
        return {"beta_schedule": name, "diffusion_steps": steps}

    def _schedule(self, steps: int) -> str:
        name, first, last = (
            self.fields.text("beta_schedule", self.defaults["beta_schedule"]),
            self.number("beta_start"),
            self.number("beta_end"),
        )
        betas = self.fields.items("trained_betas", (), null=True)
        for known in BETA_ENDS:
            if betas:
                if _same(betas, known, steps):
                    return known
            elif name == known and _fits(known, steps):
                ends = zip((first, last), beta_ends(known, steps), strict=True)
                if all(math.isclose(a, b, rel_tol=1e-6) for a, b in ends):
                    return known
        stated = (
            f"trained_betas of {len(betas)} numbers"
            if betas
            else f"beta_schedule {shown(name)} with beta_start {first:g} and beta_end {last:g}"
        )
        ours = ", ".join(f"{kind} {first:g} to {last:g}" for kind, (first, last) in BETA_ENDS.items())
        raise UserError(
            f"{self.fields.where} has {stated} at num_train_timesteps {steps}, but the schedules known here are, at "
            f"{STEPS}, {ours}; {_REMEDY}"
        )


def _fits(schedule: str, steps: int) -> bool:
    """Whether there is such a schedule of so few steps."""
    try:
        beta_ends(schedule, steps)
    except UserError:
        return False
    return True


def _same(betas: list[Any], schedule: str, steps: int) -> bool:
    """Whether a list of betas is the schedule of that name."""
    if len(betas) != steps or not _fits(schedule, steps):
        return False
    expected = schedule_betas(schedule, steps).tolist()
    return all(
        isinstance(beta, float) and math.isclose(beta, other, rel_tol=1e-5)
        for beta, other in zip(betas, expected, strict=True)
    )


def _dynamic_shift(scheduler: _SchedulerConfig, model: ModelConfig) -> str:
    """What a shift that depends on the image's size comes to for the model's own size."""
    fields = scheduler.fields
    low, high = fields.number("base_shift", 0.5), fields.number("max_shift", 1.15)
    first = fields.integer("base_image_seq_len", 256, least=1)
    last = fields.integer("max_image_seq_len", 4096, least=1)
    tokens = (model.input_size // model.patch_size) ** 2
    mu = low if first == last else low + (high - low) * (tokens - first) / (last - first)
    kind = fields.text("time_shift_type", "exponential")
    shift = math.exp(min(mu, 50.0)) if kind == "exponential" else mu
    return (
        f"a shift that depends on the image's size, and here it is one number; of this transformer's {tokens} tokens "
        f"it comes to objective.kind=flow objective.shift={shift:.4g}"
    )


def _left_out(fields: Fields, name: str, defaults: Mapping[str, Any]) -> list[str]:
    """Notes on the keys of drawing that the samplers here do not follow, and on keys that are not known."""
    drawing, unknown = [], []
    followed = {**DRAWING, **_ORDER_1} if name == _SOLVER and fields.raw("use_flow_sigmas") else DRAWING
    for key in sorted(fields.names()):
        value = fields.raw(key)
        switch = SWITCHED.get(key)
        off = switch is not None and not fields.raw(switch, defaults.get(switch))
        if key[:1] == "_" or off or (key in defaults and _equal(value, defaults[key])):
            continue
        assignment = f"{key}={shown(value)}"
        if key in DRAWING:
            drawing += [] if _equal(value, followed[key]) else [assignment]
        elif key == "variance_type":
            drawing += [] if value in (None, "learned_range") else [assignment]
        elif key == "use_dynamic_shifting" and key in defaults:  # of a schedule of betas, which has no shift
            drawing.append(assignment)
        elif key not in TRAINING or (key not in defaults and key not in _ALWAYS and value not in (None, False)):
            unknown.append(assignment)
    notes = []
    if drawing or name not in SAMPLED_HERE:
        parts = [*([] if name in SAMPLED_HERE else [name]), *drawing]
        notes.append(f"of its scheduler is left out what only draws (sample.* does so here): {', '.join(parts)}")
    if unknown:
        notes.append(f"of its scheduler are left out, since its class does not have them: {listed(unknown)}")
    return notes


def _equal(value: Any, other: Any) -> bool:
    """Equality of JSON values, in which true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
