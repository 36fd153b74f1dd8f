"""Settings: one page of typed keys, the shipped files, loading and validation. No torch here."""

from configs.cli import (
    exit_on_config_error,
    load_settings,
    parse_settings,
    run_config,
)
from configs.errors import ConfigError, UserError, machine_errors_as_user_errors, os_error_text
from configs.fields import Text, flatten
from configs.launch import (
    EXIT_BEFORE_TRAINING,
    exit_with_error,
    launch_id,
    leave_error,
)
from configs.load import load_config, parse_config, read_config, to_yaml
from configs.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DebugConfig,
    EvaluateConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    WeightedSource,
)
from configs.validate import Range, validate

__all__ = [
    "EXIT_BEFORE_TRAINING",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DebugConfig",
    "EvaluateConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Range",
    "RunConfig",
    "SourceConfig",
    "Text",
    "TrainConfig",
    "UserError",
    "WeightedSource",
    "exit_on_config_error",
    "exit_with_error",
    "flatten",
    "launch_id",
    "leave_error",
    "load_config",
    "load_settings",
    "machine_errors_as_user_errors",
    "os_error_text",
    "parse_config",
    "parse_settings",
    "read_config",
    "run_config",
    "to_yaml",
    "validate",
]
