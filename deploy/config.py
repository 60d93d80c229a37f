"""Settings of a whole run: those of the parts, and what only a run has. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    model_validator,
)

from mara.actors.config import DecodingConfig, LLMConfig, RolloutConfig
from mara.actors.reward_models.config import (
    BeaverRewardConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    RewardModelConfig,
    SequenceClassifierRewardConfig,
    UltraRMRewardConfig,
)
from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.common.config import LONGEST_S, AgentConfig, Config
from mara.learner.config import LearnerConfig

SHIPPED_PREFIX = "mara:"
SHIPPED_DIR = Path(__file__).parent
HUB_PREFIX = "hub:"


def resolve_data_path(value: Any, folder: Path) -> Any:
    """``mara:data/x`` is a file that the project ships; ``~`` is the home; the rest is under ``folder``.

    What is not a path, ``hub:NAME#SPLIT`` or no text, is returned as it is, for the check that follows.
    """
    if not isinstance(value, str) or value.startswith(HUB_PREFIX):
        return value
    if value.startswith(SHIPPED_PREFIX):
        return str(SHIPPED_DIR / value.removeprefix(SHIPPED_PREFIX))
    return os.path.normpath(folder.absolute() / Path(value).expanduser())


def is_of_hub(source: Path) -> bool:
    """Whether a setting that takes a file of prompts names a data set of the Hub."""
    return str(source).startswith(HUB_PREFIX)


def portable_name(path: Path) -> str:
    """What names ``path`` anywhere: ``mara:heads/NAME`` if the project ships it, ``hub:NAME#SPLIT`` if the
    Hub has it, else its last part."""
    if is_of_hub(path):
        return str(path)
    if path.is_relative_to(SHIPPED_DIR):
        return SHIPPED_PREFIX + path.relative_to(SHIPPED_DIR).as_posix()
    return path.name


def _resolve(value: Any, info: ValidationInfo) -> Any:
    folder = (info.context or {}).get("folder", Path.cwd())
    return resolve_data_path(str(value) if isinstance(value, Path) else value, folder)


class _IsDataPath:
    """Marks the settings whose relative values depend on where they were written."""


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
"""What names a run: it becomes part of a folder's name and of keys in the store."""

DATA_PATH = _IsDataPath()
DataPath = Annotated[Path, BeforeValidator(_resolve), DATA_PATH]
"""A file to read. Relative to the folder of the configuration file it is written in, or to the current
folder when given on the command line. ``mara:data/NAME`` and ``mara:heads/NAME`` are shipped."""


def _has_split(source: Path) -> Path:
    name, _, split = str(source).removeprefix(HUB_PREFIX).partition("#")
    if is_of_hub(source) and not (name and split):
        raise ValueError(f"{source} is no data set with a split; write such as hub:SafeRLHF#train")
    return source


PromptSource = Annotated[DataPath, AfterValidator(_has_split)]
"""A file of prompts; or ``hub:NAME#SPLIT``, part of a Hub data set: ``NAME`` is one of SafeRLHF, BeaverTails,
HarmfulQA, HH-RLHF, UltraFeedback, or another's with a column ``prompt``. Needs the package datasets."""


class HeldOutConfig(Config):
    """Prompts: a file of JSON lines with ``prompt``, ``id`` and ``category`` if wanted, or of text, one a
    line; or a data set of the Hub, ``hub:NAME#SPLIT``, such as ``hub:SafeRLHF#train``."""

    evaluation: PromptSource | None = None
    """Other prompts, for the comparison with the base LLM after training. None: no evaluation."""


class PromptsConfig(HeldOutConfig):
    """Prompts to train on, and others to compare with."""

    train: PromptSource
    """Prompts the agent is trained on; taken again from the start when all were used."""


class RewardHeadConfig(Config):
    """A reward model that is a small head on the frozen LLM's hidden states (Eq. 3)."""

    kind: Literal["head"] = "head"
    path: DataPath
    """Folder that ``mara reward fit`` wrote, or a shipped one: ``mara:heads/NAME``."""
    weight: float
    """What one unit of its score counts in the reward (Eq. 13). Negative for a cost. Usual range -2–2."""


HEAD = "head"
"""The kind of a reward for which none is given."""


def kind_of(value: Any) -> str:
    """What tells settings of one kind from those of another in the same place."""
    if isinstance(value, dict):
        return str(value.get("kind", HEAD))
    return str(getattr(value, "kind", HEAD))


RewardKinds = (
    Annotated[RewardHeadConfig, Tag(HEAD)]
    | Annotated[BeaverRewardConfig, Tag("beaver")]
    | Annotated[UltraRMRewardConfig, Tag("ultrarm")]
    | Annotated[SequenceClassifierRewardConfig, Tag("sequence_classifier")]
    | Annotated[FunctionRewardConfig, Tag("function")]
    | Annotated[HttpRewardConfig, Tag("http")]
)
RewardConfig = Annotated[RewardKinds, Discriminator(kind_of)]
"""What one entry of ``rewards`` may be, told apart by its ``kind``."""


class EvaluationConfig(Config):
    """The comparison of the trained agent with the base LLM on held-out prompts (Eq. 12)."""

    after_training: bool = True
    """Evaluate at the end of ``mara train``. ``mara eval RUN`` does it later as well."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Use only the first so many evaluation prompts. None: all."""
    rows: int = Field(default=64, ge=1)
    """Prompts answered at the same time. Usual range 16–128."""
    num_samples: int = Field(default=4, ge=0)
    """Prompts whose answers by base and agent are printed; ``report.json`` has all. Usual range 2–10."""


class WandbConfig(Config):
    """Weights & Biases. One run for each training; never asks anything."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto``: online where a login is found (``WANDB_API_KEY`` or ``~/.netrc``), else offline, which keeps
    the run in the run folder for ``wandb sync``."""
    project: str = Field(default="mara", min_length=1)
    """Name of the W&B project."""
    entity: str | None = None
    """W&B user or team. None: the login's own."""


class RayConfig(Config):
    """Where the processes run, and what is done when one dies."""

    address: str | None = None
    """``auto`` or ``HOST:PORT`` joins a running cluster. None starts Ray on this machine, for this run only,
    listening on the loopback interface."""
    start_timeout_s: float = Field(default=120.0, gt=0, le=LONGEST_S)
    """Longest wait for the cluster to have room for the learner and for each rollout actor, seconds."""
    max_actor_restarts: int = Field(default=20, ge=0)
    """Rollout actors that may die and be replaced in one run before the run is given up."""


class RunFolderConfig(Config):
    """The run's folder, name and seed."""

    dir: Path = Path("runs")
    """Where run folders are made. Relative to the current folder."""
    name: str | None = Field(default=None, pattern=RUN_NAME)
    """First part of the folder's name; the time follows. None: the name of the configuration file."""
    seed: int = Field(default=0, ge=0)
    """Every random stream of the run derives from it. How actors interleave still differs between runs."""
    stop_timeout_s: float = Field(default=60.0, gt=0, le=LONGEST_S)
    """Longest wait for the learner to save when the run is stopped, seconds."""


class AgentUse(Config):
    """What it takes to answer with a trained agent, and to compare it with the LLM alone."""

    llm: LLMConfig
    """The frozen LLM."""
    prompts: HeldOutConfig = HeldOutConfig()
    """What it is asked."""
    rewards: dict[str, RewardConfig] = Field(default={})
    """Reward models by name. The evaluation calls a positive weight better when higher, a negative one
    better when lower."""
    decoding: DecodingConfig = DecodingConfig()
    """How answers are generated, in training and in evaluation."""
    rollout: RolloutConfig = RolloutConfig()
    """The rollout actors."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The comparison with the base LLM."""
    run: RunFolderConfig = RunFolderConfig()
    """Folder, name and seed."""

    @property
    def score_weights(self) -> dict[str, float]:
        """Weight of each reward model by name."""
        return {name: reward.weight for name, reward in self.rewards.items()}

    @property
    def heads(self) -> dict[str, RewardHeadConfig]:
        """The rewards that are heads on the LLM, scored where it decodes, by name."""
        return {name: one for name, one in self.rewards.items() if isinstance(one, RewardHeadConfig)}

    @property
    def reward_models(self) -> dict[str, RewardModelConfig]:
        """All other rewards, each with processes of its own, by name."""
        return {name: one for name, one in self.rewards.items() if isinstance(one, RewardModelConfig)}


class RunConfig(AgentUse):
    """Everything ``mara train`` needs to know."""

    prompts: PromptsConfig
    """What the LLM is asked."""
    rewards: dict[str, RewardConfig]
    """Reward models by name. The evaluation calls a positive weight better when higher, a negative one
    better when lower."""
    agent: AgentConfig = AgentConfig()
    """The accept-reject network."""
    shaping: ShapingConfig = ShapingConfig()
    """How scores and penalties become rewards."""
    replay: ReplayConfig = ReplayConfig()
    """The replay log and its mirror in the learner."""
    learner: LearnerConfig = LearnerConfig()
    """The learner and its algorithm."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    ray: RayConfig = RayConfig()
    """Processes and supervision."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one reward head with its path and weight")
        if all(reward.weight == 0 for reward in self.rewards.values()):
            raise ValueError("rewards: every weight is 0; give at least one another value")
        if self.shaping.score_weights:
            raise ValueError(
                f"shaping.score_weights={self.shaping.score_weights} is not set here; "
                "give each weight as rewards.NAME.weight"
            )
        if self.shaping.terminal == "progress" and self.reward_models:
            name, reward = next(iter(self.reward_models.items()))
            raise ValueError(
                "shaping.terminal=progress needs rewards that judge unfinished answers, as heads do; "
                f"rewards.{name} is of kind {kind_of(reward)}: use shaping.terminal=last or spread"
            )
        if self.replay.from_run is not None and self.rollout.num_actors > 0:
            raise ValueError(
                f"replay.from={self.replay.from_run} trains on the episodes of a finished run, "
                f"rollout.num_actors={self.rollout.num_actors} would make new ones; set rollout.num_actors=0"
            )
        if self.replay.from_run is None and self.rollout.num_actors == 0:
            raise ValueError(
                f"rollout.num_actors={self.rollout.num_actors} leaves nobody to make episodes; use at least "
                "1, or replay.from=RUN to train on those of a finished run"
            )
        if self.ray.address is not None and self.replay.redis_url is None:
            raise ValueError(
                f"ray.address={self.ray.address} needs a server that all nodes reach; set replay.redis_url"
            )
        return self

    @property
    def reward_cpus(self) -> float:
        """Cores that the processes of reward models take in all."""
        return sum(one.replicas * one.num_cpus for one in self._placed)

    @property
    def reward_gpus(self) -> float:
        """GPUs that the processes of reward models take in all."""
        return sum(one.replicas * one.num_gpus for one in self._placed)

    @property
    def _placed(self) -> list[RewardModelConfig]:
        """Reward models that get processes: without rollout actors nobody asks them."""
        return list(self.reward_models.values()) if self.rollout.num_actors else []

    @property
    def weighted_shaping(self) -> ShapingConfig:
        """``shaping`` with the weights that ``rewards`` gives."""
        return self.shaping.model_copy(update={"score_weights": self.score_weights})
