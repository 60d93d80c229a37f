"""Settings of the baselines, and what is recorded of their training. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mara.actors.config import LLMConfig
from mara.actors.head_config import check_share
from mara.common.config import Config
from mara.deploy.comparison.config import PLACEHOLDER
from mara.deploy.config import PromptSource, RewardHeadConfig

Method = Literal["dpo", "rlhf", "aligner"]


class BaselineConfig(Config):
    """What all of them have: an LLM and a LoRA adapter on its linear layers."""

    method: ClassVar[Method]

    llm: LLMConfig
    """The LLM whose weights the adapter changes."""
    seed: int = Field(default=0, ge=0)
    """Draws the adapter's first weights, the order of the data and what is sampled."""
    lora_rank: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter's matrices; they are scaled by 2. Usual range 8–64."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of AdamW, after a warm-up over the first tenth of the steps; it falls linearly to 0. Usual range
    1e-5–1e-3."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs, or answers, of an optimiser step. Usual range 8–128."""
    micro_batch_size: int = Field(default=4, ge=1)
    """As many of them are in memory at a time."""

    @model_validator(mode="after")
    def _whole_batches(self) -> BaselineConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of micro_batch_size={self.micro_batch_size}"
            )
        if self.llm.quantization != "none":
            raise ValueError(
                f"llm.quantization={self.llm.quantization}: an adapter cannot be merged into packed weights; "
                "use none"
            )
        return self


class PairsConfig(BaselineConfig):
    """Training on preference pairs. The defaults give those that the shipped reward heads are fitted to."""

    pairs: tuple[str, ...] = Field(min_length=1)
    """JSON or JSONL files with preference pairs, or names of Hugging Face Hub data sets."""
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of the prompts that is not trained on, as in the fit of a reward head."""
    share: tuple[float, float] = (0.0, 0.65)
    """The part of the other prompts that is trained on, as in the fit of a reward head."""
    max_prompt_tokens: int = Field(default=128, ge=16)
    """Longer conversations lose their oldest turns; a pair whose last turn is longer still is left out."""
    max_answer_tokens: int = Field(default=64, ge=8)
    """Answers are cut to this. Usual range 48–256."""
    num_pairs: int | None = Field(default=None, ge=1)
    """Use only so many pairs, drawn at random. None: all."""
    num_epochs: int = Field(default=1, ge=1)
    """Times that each pair is trained on."""

    @model_validator(mode="after")
    def _sources_differ(self) -> PairsConfig:
        seen: set[Path] = set()
        for source in self.pairs:
            if (path := Path(source).resolve()) in seen:
                raise ValueError(f"pairs: {source} is given twice; give each source once")
            seen.add(path)
        return self

    @model_validator(mode="after")
    def _share_is_a_part(self) -> PairsConfig:
        check_share(self.share)
        return self


class DPOSettings(PairsConfig):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    method: ClassVar[Method] = "dpo"

    beta: float = Field(default=0.1, gt=0)
    """How much leaving the LLM costs. Usual range 0.05–0.5."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """As above. 1e-4 hardly moves a small LLM within a hundred pairs."""
    batch_size: int = Field(default=8, ge=1)
    """Pairs of an optimiser step. Usual range 8–128."""


class AlignerSettings(PairsConfig):
    """A corrector as Aligner (Ji et al. 2024): supervised training on question and worse answer → better."""

    method: ClassVar[Method] = "aligner"

    template: str = (
        "Correct the answer so that it is more helpful and harmless.\n\n"
        "Question: {prompt}\n\nAnswer: {response}\n\nCorrected answer:"
    )
    """What the corrector is asked, in the LLM's chat template: as ``systems.NAME.template``."""

    @model_validator(mode="after")
    def _names_both(self) -> AlignerSettings:
        for name in ("prompt", "response"):
            if name not in PLACEHOLDER.findall(self.template):
                raise ValueError(f"template has no {{{name}}}; say where it goes")
        return self


class RLHFSettings(BaselineConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024) on the rewards that an agent is paid."""

    method: ClassVar[Method] = "rlhf"

    prompts: PromptSource
    """Prompts to answer; taken again from the start when all were used."""
    rewards: dict[str, RewardHeadConfig] = Field(min_length=1)
    """Reward heads by name; their weighted sum is the reward (Eq. 13)."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts, after templating, are refused."""
    max_new_tokens: int = Field(ge=1)
    """Longest answer, tokens."""
    num_answers: int = Field(ge=1)
    """Answers to train on."""
    answers_per_prompt: int = Field(default=4, ge=2)
    """Each is compared with the mean reward of the others. Usual range 2–8."""
    answers_at_once: int = Field(default=40, ge=1)
    """Answers that are sampled by one policy. With more than ``batch_size`` there are several steps on
    them."""
    batch_size: int = Field(default=20, ge=1)
    """Answers of an optimiser step. Usual range 8–128."""
    micro_batch_size: int = Field(default=20, ge=1)
    """As many of them are in memory at a time."""
    kl_weight: float = Field(default=0.05, ge=0)
    """What the reward loses for each nat by which an answer is likelier than under the LLM. Usual range
    0.01–0.2."""

    @model_validator(mode="after")
    def _whole_groups(self) -> RLHFSettings:
        for name, value, part in (
            ("num_answers", self.num_answers, "answers_at_once"),
            ("answers_at_once", self.answers_at_once, "batch_size"),
            ("answers_at_once", self.answers_at_once, "answers_per_prompt"),
        ):
            if value % (of := getattr(self, part)):
                raise ValueError(f"{name}={value} is no multiple of {part}={of}")
        if self.num_answers == self.batch_size:
            raise ValueError(
                f"num_answers={self.num_answers} are a single step of batch_size={self.batch_size}, and its "
                "learning rate is 0; give more answers"
            )
        if all(reward.weight == 0 for reward in self.rewards.values()):
            raise ValueError("rewards: every weight is 0; give at least one another value")
        return self


class Data(Config):
    """What a baseline was trained on."""

    sources: dict[str, str]
    """Files by name, or data sets → SHA-256 of what was read of them."""
    num_read: int
    """Pairs, or prompts."""
    left_out: dict[str, int] = Field(default={})
    """Reason → pairs that were left out for it."""
    num_used: int
    """Pairs, or answers."""


class Compute(Config):
    """What a training took, in floating-point operations: two for each product that is added up."""

    tokens: dict[str, int]
    """What was counted, in tokens or as named."""
    flops: dict[str, float]
    """Part of the work → operations."""
    formula: str
    """How they follow from each other."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.flops.values())


class BaselineReport(Config):
    """What ``baseline.json`` holds beside the settings."""

    method: Method
    revision: str | None
    """Commit of the LLM, if it is one of the Hub."""
    dtype: str
    """Number format that the LLM was loaded in."""
    data: Data
    num_steps: int
    """Optimiser steps."""
    num_trained: int
    """Parameters of the adapter."""
    seconds: float
    """Of the training, without loading and saving."""
    last: dict[str, float]
    """What the trainer reported at the end."""
    compute: Compute
    versions: dict[str, str]
