"""The trainings themselves, by TRL's trainers. Imported only where the extra ``baselines`` is installed.

The trainers get token ids made as everywhere else in the project, so that nothing depends on a chat template
or a cut of theirs; two of them have no public way to be given those, so a method of each is replaced.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import peft
import torch
import transformers
import trl

from mara.actors.heads import RewardHead
from mara.actors.llm import LLM
from mara.actors.prompts import Prompt, endless
from mara.deploy.baselines.config import (
    AlignerSettings,
    BaselineConfig,
    DPOSettings,
    RLHFSettings,
)
from mara.deploy.baselines.material import PairIds
from mara.deploy.baselines.scoring import SampledTokens, Scorer

Tell = Callable[[int, int, Mapping[str, float]], None]
"""Gets steps done, steps in all, and what the trainer measured last."""
IGNORED = -100
"""The label of a token that is read and not learnt."""


class Trained(NamedTuple):
    """An adapted LLM and how it came about."""

    model: Any
    num_steps: int
    seconds: float
    last: dict[str, float]
    """What the trainer measured last."""


def train_dpo(llm: LLM, pairs: Sequence[PairIds], config: DPOSettings, tell: Tell) -> Trained:
    """Train an adapter by DPO; the plain LLM is the reference."""
    rows = [pair._asdict() for pair in pairs]
    settings = {"num_train_epochs": config.num_epochs, "max_length": None, "beta": config.beta}
    return _train(_DPOTrainer, trl.DPOConfig, settings, rows, llm, config, tell)


def train_aligner(llm: LLM, pairs: Sequence[PairIds], config: AlignerSettings, tell: Tell) -> Trained:
    """Train an adapter to write the better answer when it is asked to correct the worse one."""
    rows = [
        {
            "input_ids": pair.prompt_ids + pair.chosen_ids,
            "labels": [IGNORED] * len(pair.prompt_ids) + pair.chosen_ids,
        }
        for pair in pairs
    ]
    settings = {
        "num_train_epochs": config.num_epochs,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return _train(trl.SFTTrainer, trl.SFTConfig, settings, rows, llm, config, tell)


def train_rlhf(
    llm: LLM,
    reader: LLM,
    prompts: Sequence[Prompt],
    heads: Mapping[str, RewardHead],
    config: RLHFSettings,
    tell: Tell,
) -> tuple[Trained, SampledTokens]:
    """Train an adapter by RLOO on sampled answers.

    Args:
        reader: the plain LLM, whose states the heads score.
        heads: by the names of ``config.rewards``.
    """
    num_prompts = config.num_answers // config.answers_per_prompt
    asked = itertools.islice(endless(prompts, config.seed), num_prompts)
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    scorer = Scorer(reader, heads, weights)
    settings = {
        "num_train_epochs": 1,
        "num_generations": config.answers_per_prompt,
        "generation_batch_size": config.answers_at_once,
        "max_completion_length": config.max_new_tokens,
        "beta": config.kl_weight,
    }
    trainer = functools.partial(_RLOOTrainer, render=llm.render, reward_funcs=scorer.score)
    rows = [{"prompt": prompt.prompt} for prompt in asked]
    trained = _train(trainer, trl.RLOOConfig, settings, rows, llm, config, tell)
    return trained, scorer.tokens


class _DPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """Takes pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class _RLOOTrainer(trl.RLOOTrainer):  # type: ignore[misc]
    """Puts prompts into the chat template as the rollouts of an agent do."""

    def __init__(self, model: Any, render: Callable[[str], list[int]], **options: Any) -> None:
        self._render = render
        super().__init__(model, **options)

    def _tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._render(prompt) for prompt in prompts], None, {}


class _Steps(transformers.TrainerCallback):  # type: ignore[misc]
    """Hands on what the trainer does."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.last: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        """Keep what is measured at each step; the summary at the end has other names."""
        if "loss" in logs:
            numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
            # Of what is sampled only the first step on it tells. Some measurements have no value at times.
            self.last |= {name: value for name, value in numbers.items() if math.isfinite(value)}
            self._tell(state.global_step, state.max_steps, self.last)


def _train(
    trainer_class: Callable[..., Any],
    arguments_class: Callable[..., Any],
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    llm: LLM,
    config: BaselineConfig,
    tell: Tell,
) -> Trained:
    """Train an adapter on ``rows``; ``settings`` are what this trainer is told beside :func:`_arguments`."""
    # No telemetry, and no look at the Hub for a model that is loaded already.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    steps = _Steps(tell)
    with warnings.catch_warnings(), TemporaryDirectory(prefix="mara-baseline-") as folder:
        warnings.simplefilter("ignore", FutureWarning)  # of names that the libraries use among themselves
        trainer = trainer_class(
            llm.model,
            args=arguments_class(**_arguments(llm, config, folder), **settings),
            train_dataset=datasets.Dataset.from_list(list(rows)),
            processing_class=llm.tokenizer,
            peft_config=_adapter(config),
            callbacks=[steps],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        began_s = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began_s
    return Trained(trainer.model, int(trainer.state.global_step), seconds, steps.last)


def _adapter(config: BaselineConfig) -> Any:
    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _arguments(llm: LLM, config: BaselineConfig, folder: str) -> dict[str, Any]:
    """What every trainer is told. The base weights stay in the LLM's format, the adapter's are float32."""
    return {
        "output_dir": folder,
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # below 1 it is a share of all steps
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // config.micro_batch_size,
        "gradient_checkpointing": False,
        "bf16": llm.dtype == torch.bfloat16,
        "fp16": llm.dtype == torch.float16,
        "use_cpu": llm.device.type == "cpu",
        "dataloader_pin_memory": llm.device.type != "cpu",
        "report_to": "none",
        "push_to_hub": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
