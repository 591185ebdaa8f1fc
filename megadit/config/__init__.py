"""Typed run configuration: schema, YAML with inheritance and overrides, presets, DeepSpeed files, errors for people.

Importing it loads neither torch nor deepspeed, so that commands answer ``--help`` at once.
"""

from megadit.config.dsconfig import MergedConfig, merge_ds_config
from megadit.config.loader import LoadedConfig, load, load_config, replace, save_config, to_yaml
from megadit.config.model import ModelConfig, Role, RoleHP, RoleHPs
from megadit.config.presets import preset, preset_names
from megadit.config.run import (
    ClipConfig,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    VaeConfig,
)

__all__ = [
    "ClipConfig",
    "DataConfig",
    "LoadedConfig",
    "MergedConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "Role",
    "RoleHP",
    "RoleHPs",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "VaeConfig",
    "load",
    "load_config",
    "merge_ds_config",
    "preset",
    "preset_names",
    "replace",
    "save_config",
    "to_yaml",
]
