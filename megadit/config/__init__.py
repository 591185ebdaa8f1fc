"""Typed run configuration: schema, YAML with inheritance and overrides, presets, DeepSpeed files, errors for people.

Importing it loads neither torch nor deepspeed, so that commands answer ``--help`` at once.
"""

from megadit.config.deepspeed.merge import merge_ds_config
from megadit.config.loading.loader import LoadedConfig, load, load_config, replace, save_config, to_yaml
from megadit.config.presets import preset, preset_names
from megadit.config.schema.data import DataConfig
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.optim import OptimConfig
from megadit.config.schema.parallel import ParallelConfig
from megadit.config.schema.run import ObjectiveConfig, RunConfig, SampleConfig, TrainConfig

__all__ = [
    "DataConfig",
    "LoadedConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "load",
    "load_config",
    "merge_ds_config",
    "preset",
    "preset_names",
    "replace",
    "save_config",
    "to_yaml",
]
