"""From settings to a reward model."""

from __future__ import annotations

from pathlib import Path

from mara.actors.reward_models.config import (
    BeaverRewardConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    RewardModelConfig,
    SequenceClassifierRewardConfig,
    UltraRMRewardConfig,
)
from mara.common.contracts import RewardModel
from mara.common.errors import UserError


def load_reward_model(field: str, config: RewardModelConfig, folder: Path) -> RewardModel:
    """The reward model at ``field`` (``rewards.NAME``), ready to score. Takes as long as its weights do.

    Args:
        folder: where the module of a function may be, besides those installed.

    Raises:
        UserError: it cannot be loaded; names the setting.
    """
    try:
        return _load(config, folder)
    except UserError as error:
        raise UserError(f"{field}.{error}") from error


def _load(config: RewardModelConfig, folder: Path) -> RewardModel:
    # Each kind brings in its own libraries.
    if isinstance(config, FunctionRewardConfig):
        from mara.actors.reward_models.function import FunctionRewardModel, load_function

        return FunctionRewardModel(load_function(config.function, folder), config.batch_size)
    if isinstance(config, HttpRewardConfig):
        from mara.actors.reward_models.http import HttpRewardModel

        return HttpRewardModel(config)
    from mara.actors.reward_models import checkpoint

    if isinstance(config, BeaverRewardConfig):
        return checkpoint.load_beaver(config)
    if isinstance(config, UltraRMRewardConfig):
        return checkpoint.load_ultrarm(config)
    assert isinstance(config, SequenceClassifierRewardConfig)
    return checkpoint.load_sequence_classifier(config)
