"""Judges made from their settings. A new kind of judge that scores is a case here and in the settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mara.actors.heads import HeadRewardModel, head_digests, load_head, read_head_llm
from mara.actors.llm import LLM
from mara.actors.llm_judge import LLMJudge
from mara.common.contracts import RewardModel
from mara.common.errors import UserError
from mara.deploy.comparison.config import LLMJudgeConfig
from mara.deploy.config import RewardHeadConfig
from mara.deploy.preflight import warn_of_another_llm


def check_scoring_judge(name: str, config: RewardHeadConfig, hidden_size: int, model: str) -> dict[str, str]:
    """The judge can be read and fits the base LLM; SHA-256 of its files by name. Loads no LLM.

    Raises:
        UserError: it cannot, or does not.
    """
    field = f"judges.{name}.path"
    try:
        load_head(config.path, hidden_size)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    warn_of_another_llm(field, "fitted", read_head_llm(config.path), model)
    return head_digests(config.path)


def open_scoring_judge(config: RewardHeadConfig, base: Callable[[], LLM]) -> RewardModel:
    """The judge, ready to score. A head reads the text with the base LLM, whoever wrote it."""
    llm = base()
    return HeadRewardModel(llm, load_head(Path(config.path), llm.hidden_size).to(llm.device))


def make_llm_judge(name: str, config: LLMJudgeConfig) -> LLMJudge:
    """The judge, with its key from the environment.

    Raises:
        UserError: the variable that should have the key is not set.
    """
    field = f"judges.{name}"
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise UserError(
                f"{field}.api_key_env: the variable {config.api_key_env} is not set; put the "
                f"key of {config.url} there"
            )
    return LLMJudge(
        url=config.url,
        model=config.model,
        api_key=key,
        instruction=config.instruction,
        timeout_s=config.timeout_s,
        max_attempts=config.max_attempts,
        max_tokens=config.max_tokens,
        field=field,
    )
