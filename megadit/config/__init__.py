"""Typed run configuration: schema, YAML with inheritance and overrides, presets, DeepSpeed files, errors for people.

Importing it loads neither torch nor deepspeed, so that commands answer ``--help`` at once.
"""

from megadit.config.deepspeed.merge import MergedConfig, merge_ds_config
from megadit.config.loading.loader import LoadedConfig, load, load_config, replace, save_config, to_yaml
from megadit.config.presets import preset, preset_names
from megadit.config.schema.data import DataConfig, FeatureSource, TextSource, VaeConfig
from megadit.config.schema.layout import ParallelConfig
from megadit.config.schema.model import ModelConfig, RepaProjector, Role, RoleHP, RoleHPs, TextInput
from megadit.config.schema.optim import ClipConfig, OptimConfig
from megadit.config.schema.run import ObjectiveConfig, RunConfig, SampleConfig, TrainConfig

__all__ = [
    "ClipConfig",
    "DataConfig",
    "FeatureSource",
    "LoadedConfig",
    "MergedConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "RepaProjector",
    "Role",
    "RoleHP",
    "RoleHPs",
    "RunConfig",
    "SampleConfig",
    "TextInput",
    "TextSource",
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
