"""The config of a run: its fields, defaults and checks, and how files edit it."""

from mtp_jax.config.formats import config_from_json, config_to_json
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.init import HeadStart, InitConfig
from mtp_jax.config.layer import LayerConfig
from mtp_jax.config.listing import config_to_python
from mtp_jax.config.loss import Balance, LossConfig, LossKind
from mtp_jax.config.model import Dtype, ModelConfig
from mtp_jax.config.optim import OptimConfig, Schedule
from mtp_jax.config.rope import RopeConfig
from mtp_jax.config.schedules import Table
from mtp_jax.config.section_tree import PARTS_OF_MODEL, as_tree, sections_of
from mtp_jax.config.sections import (
    Attention,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    HeadLoss,
    LogConfig,
    MeshConfig,
    Remat,
    ScanLayers,
    TrainConfig,
)
from mtp_jax.config.tree import default, freeze

__all__ = [
    "PARTS_OF_MODEL",
    "Attention",
    "Balance",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "Dtype",
    "EvalConfig",
    "HeadLoss",
    "HeadStart",
    "HeadsConfig",
    "InitConfig",
    "LayerConfig",
    "LogConfig",
    "LossConfig",
    "LossKind",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Remat",
    "RopeConfig",
    "ScanLayers",
    "Schedule",
    "Table",
    "TrainConfig",
    "as_tree",
    "config_from_json",
    "config_to_json",
    "config_to_python",
    "default",
    "freeze",
    "sections_of",
]
