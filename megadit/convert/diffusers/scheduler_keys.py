"""Keys of diffusers' schedulers: which say how a model was trained, and which only how pictures are drawn.

The classes here are those whose models are trained by what ``objective.*`` can say. Others distil or precondition a
model (LCM, TCD, EDM, consistency models), or are of other data, and are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

STEPS = 1000  # of training; a model of diffusers is told their numbers
# Keys that say how the model was trained.
TRAINING = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "shift",
    "rescale_betas_zero_snr", "use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "time_shift_type", "invert_sigmas", "timestep_type", "variance_type",
    "predict_epsilon",
)  # fmt: skip
# Keys of drawing alone, with what the samplers here do: such a value needs no word.
DRAWING: Mapping[str, Any] = MappingProxyType(
    {
        "algorithm_type": "dpmsolver++",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "corrector_order": 2,
        "disable_corrector": [],
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "lambda_min_clipped": -float("inf"),
        "lower_order_final": True,
        "noise_sampler_seed": None,
        "predict_x0": True,
        "predictor_order": 2,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "shift_terminal": None,
        "sigma_max": None,
        "sigma_min": None,
        "skip_prk_steps": True,
        "solver_order": 2,
        "solver_p": None,
        "solver_type": "midpoint",
        "steps_offset": 0,
        "stochastic_sampling": False,
        "tau_func": None,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
    }
)
# Keys that another one must switch on before they do anything.
SWITCHED: Mapping[str, str] = MappingProxyType(
    {
        "clip_sample_range": "clip_sample",
        "dynamic_thresholding_ratio": "thresholding",
        "sample_max_value": "thresholding",
        "flow_shift": "use_flow_sigmas",
        "base_shift": "use_dynamic_shifting",
        "max_shift": "use_dynamic_shifting",
        "base_image_seq_len": "use_dynamic_shifting",
        "max_image_seq_len": "use_dynamic_shifting",
        "time_shift_type": "use_dynamic_shifting",
    }
)
_BETAS = {
    "num_train_timesteps": STEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon",
}  # fmt: skip
_OF_LATENTS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_DYNAMIC = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, **_THRESHOLD, **_LEADING, "rescale_betas_zero_snr": False}
_DDIM = {**_BETAS, **_CLIPPED, "set_alpha_to_one": True}
_DDPM = {**_BETAS, **_CLIPPED, "variance_type": "fixed_small"}
_SOLVER = {**_BETAS, **_THRESHOLD, **_SIGMAS, **_FLOW, "solver_order": 2}
_DPM = {
    **_SOLVER, **_DYNAMIC, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
    "final_sigmas_type": "zero", "lambda_min_clipped": -float("inf"), "variance_type": None,
}  # fmt: skip
_KDPM2 = {**_OF_LATENTS, **_SIGMAS, **_SPACED}
# The classes whose training is known here, and what a key that is left out stands for.
SCHEDULERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "DDIMScheduler": _DDIM,
        "DDIMParallelScheduler": _DDIM,
        "DDPMScheduler": _DDPM,
        "DDPMParallelScheduler": _DDPM,
        "DEISMultistepScheduler": {
            **_SOLVER, **_DYNAMIC, **_SPACED, "algorithm_type": "deis", "solver_type": "logrho",
            "lower_order_final": True,
        },
        "DPMSolverMultistepScheduler": {
            **_DPM, **_SPACED, "euler_at_final": False, "use_lu_lambdas": False, "rescale_betas_zero_snr": False,
        },
        "DPMSolverSDEScheduler": {**_KDPM2, "noise_sampler_seed": None},
        "DPMSolverSinglestepScheduler": {**_DPM, "lower_order_final": False},
        "EulerAncestralDiscreteScheduler": {**_BETAS, **_SPACED, "rescale_betas_zero_snr": False},
        "EulerDiscreteScheduler": {
            **_BETAS, **_SIGMAS, **_SPACED, "interpolation_type": "linear", "sigma_min": None, "sigma_max": None,
            "timestep_type": "discrete", "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
        },
        "HeunDiscreteScheduler": {**_KDPM2, "clip_sample": False, "clip_sample_range": 1.0},
        "KDPM2AncestralDiscreteScheduler": _KDPM2,
        "KDPM2DiscreteScheduler": _KDPM2,
        "LMSDiscreteScheduler": {**_BETAS, **_SIGMAS, **_SPACED},
        "PNDMScheduler": {**_BETAS, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
        "SASolverScheduler": {
            **_BETAS, **_THRESHOLD, **_SIGMAS, **_FLOW, **_SPACED, "predictor_order": 2, "corrector_order": 2,
            "tau_func": None, "algorithm_type": "data_prediction", "lower_order_final": True,
            "lambda_min_clipped": -float("inf"), "variance_type": None,
        },
        "UniPCMultistepScheduler": {
            **_SOLVER, **_DYNAMIC, **_SPACED, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True,
            "disable_corrector": [], "solver_p": None, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False,
            "sigma_min": None, "sigma_max": None, "shift_terminal": None,
        },
        "FlowMatchEulerDiscreteScheduler": {
            "num_train_timesteps": STEPS, "shift": 1.0, **_SIGMAS, **_DYNAMIC, "base_shift": 0.5, "max_shift": 1.15,
            "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
            "stochastic_sampling": False,
        },
        "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": STEPS, "shift": 1.0},
    }
)  # fmt: skip
# Classes that draw as ``sample.scheduler`` can: they need no word either.
SAMPLED_HERE = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
