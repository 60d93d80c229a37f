"""Settings of a comparison. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from mara.actors.config import DecodingConfig, GateConfig, LLMConfig
from mara.actors.reward_models.config import RewardModelConfig
from mara.common.addresses import may_hold_password
from mara.common.config import LONGEST_S, Config
from mara.deploy.config import RUN_NAME, DataPath, RayConfig, RewardHeadConfig, RewardKinds, kind_of

RECORD = "comparison.json"
"""In the folder of a comparison: what must stay the same for it to go on."""
LIKELIHOOD = "likelihood"
"""Beside the judges' scores: how probable each answer is under the base LLM, which gives the perplexity."""
JOINT = "joint"
"""The rate that all judges give together."""
RESERVED = (LIKELIHOOD, JOINT, "a", "b", "dataset", "category", "num_prompts")
"""Names that no judge can have: the report has something else by that name."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
"""What names a system, a data set or a judge: it becomes a file's name."""
PLACEHOLDER = re.compile(r"\{(prompt|response)\}")

Name = Annotated[str, StringConstraints(pattern=NAME)]
UserPath = Annotated[Path, AfterValidator(lambda path: path.expanduser().resolve())]
"""A file or folder of the user's own, relative to the current folder wherever it is written, as ``run.dir``.
Resolved at once: what ``runs/latest`` names may change."""


class LLMSystem(Config):
    """A plain LLM: the base one, another, or the base with a PEFT adapter."""

    kind: Literal["llm"] = "llm"
    """What makes the answers."""
    model: str | None = None
    """As ``llm.model``. None: the base LLM."""
    adapter: UserPath | None = None
    """Folder of a PEFT adapter, which is merged into the model. Needs the package peft."""
    sampling: bool = False
    """Draw each token from the candidate set at temperature 1 instead of taking the most probable one."""


class AgentSystem(Config):
    """An LLM steered by an agent: the base one, another of the same hidden size, or one with an adapter."""

    kind: Literal["agent"] = "agent"
    """What makes the answers."""
    path: UserPath
    """A run, or an exported agent. Relative to the current folder."""
    model: str | None = None
    """As ``llm.model``. None: the base LLM."""
    adapter: UserPath | None = None
    """Folder of a PEFT adapter, which is merged into the model. Needs the package peft."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """As ``decoding.threshold``, for this system. None: that one."""
    gate: GateConfig | None = None
    """As ``decoding.gate``, for this system. None: that one."""
    steering: Literal["policy", "value"] | None = None
    """As ``decoding.steering``, for this system. None: that one."""
    min_advantage: float | None = Field(default=None, ge=0)
    """As ``decoding.min_advantage``, for this system. None: that one."""

    def used_in(self, decoding: DecodingConfig) -> DecodingConfig:
        """``decoding`` with the settings of this system's own."""
        own = {name: getattr(self, name) for name in ("threshold", "gate", "steering", "min_advantage")}
        return decoding.model_copy(update={name: value for name, value in own.items() if value is not None})


class BestOfNSystem(Config):
    """The best of several sampled answers of the base LLM, by judges that score."""

    kind: Literal["best_of_n"] = "best_of_n"
    """What makes the answers."""
    n: int = Field(default=8, ge=1)
    """Answers sampled to each prompt. Usual range 4–64."""
    judges: tuple[str, ...] = Field(min_length=1)
    """Whose weighted sum of scores decides."""


class CorrectorSystem(Config):
    """An LLM that rewrites another system's answer."""

    kind: Literal["corrector"] = "corrector"
    """What makes the answers."""
    of: str
    """The system whose answers are rewritten."""
    model: str | None = None
    """As ``llm.model``. None: the base LLM."""
    adapter: UserPath | None = None
    """Folder of a PEFT adapter, which is merged into the model. Needs the package peft."""
    template: str
    """What the corrector is asked; ``{prompt}`` and ``{response}`` stand for question and answer."""
    chat_template: bool = True
    """Put the text into the model's chat template. False: the text as it is."""

    @model_validator(mode="after")
    def _names_the_response(self) -> CorrectorSystem:
        if "response" not in PLACEHOLDER.findall(self.template):
            raise ValueError("template has no {response}; say where the answer to be rewritten goes")
        return self


class ResponsesSystem(Config):
    """Answers that somebody else made."""

    kind: Literal["responses"] = "responses"
    """What makes the answers."""
    path: DataPath
    """JSON lines with ``response`` and ``id`` or ``prompt``, for every prompt of every data set."""


SystemConfig = Annotated[
    LLMSystem | AgentSystem | BestOfNSystem | CorrectorSystem | ResponsesSystem, Field(discriminator="kind")
]


class DatasetConfig(Config):
    """Prompts: a file, or a data set of the Hugging Face Hub."""

    path: DataPath | None = None
    """JSON lines with ``prompt``, ``id`` and ``category`` if wanted; or text, one prompt a line."""
    hub: str | None = None
    """A Hub data set, or one of SafeRLHF, BeaverTails, HarmfulQA, HH-RLHF, UltraFeedback, whose split and
    columns are known. Needs the package datasets."""
    split: str | None = None
    """Part of the Hub data set. None: that of the known one, else ``test``."""
    prompt_column: str | None = None
    """Column with the prompts. None: that of the known one, else ``prompt``."""
    category_column: str | None = None
    """Column with the categories. None: that of the known one, if it has any."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Use only the first so many prompts. None: all."""

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path, a file of prompts, or hub, the name of a Hub data set")
        given = [name for name in ("split", "prompt_column", "category_column") if getattr(self, name)]
        if self.path is not None and given:
            raise ValueError(f"{given[0]} belongs to a Hub data set; leave it out beside path")
        return self


class LLMJudgeConfig(Config):
    """A large LLM asked which of two answers is better, in both orders."""

    kind: Literal["llm_judge"] = "llm_judge"
    """What judges."""
    url: str
    """Of an OpenAI-compatible endpoint, such as ``http://host:8000/v1``."""
    model: str
    """Name of the model there."""
    api_key_env: str | None = None
    """Variable of the environment with the key. None: no key is sent."""
    instruction: str | None = None
    """What makes an answer the better one, in words. None: how helpful and harmless it is."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Questions asked at the same time."""
    timeout_s: float = Field(default=120.0, gt=0, le=LONGEST_S)
    """Longest wait for a verdict, seconds."""
    max_attempts: int = Field(default=5, ge=1)
    """Times a question is asked where the endpoint is busy, fails or does not answer."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest verdict, tokens."""

    @model_validator(mode="after")
    def _address(self) -> LLMJudgeConfig:
        if not re.match("https?://", self.url):
            raise ValueError(f"url={self.url} is not an address; give one such as http://localhost:8000/v1")
        if may_hold_password(self.url) or "?" in self.url:
            raise ValueError(
                "url must have no password or options; give the key in a variable that api_key_env names"
            )
        return self


JudgeConfig = Annotated[
    RewardKinds | Annotated[LLMJudgeConfig, Tag("llm_judge")],
    Discriminator(kind_of),
]
"""What one entry of ``judges`` may be: what ``rewards`` of a training may be, or an LLM that compares. Those
that score are loaded into the processes of the comparison, so their own resources and time-outs count for
nothing."""


class ComparisonConfig(Config):
    """Everything ``mara eval CONFIG`` needs to know."""

    llm: LLMConfig
    """The frozen base LLM."""
    decoding: DecodingConfig = DecodingConfig()
    """How answers are generated."""
    systems: dict[Name, SystemConfig]
    """What is compared, by name."""
    datasets: dict[Name, DatasetConfig] = Field(min_length=1)
    """What is asked, by name."""
    judges: dict[Name, JudgeConfig] = Field(default={})
    """Who compares, by name. Of judges that score, a positive weight says that higher is better, a negative
    one that lower is, and 0 that only the mean score is reported."""
    juries: dict[Name, tuple[str, ...]] = Field(default={})
    """Judges whose scores make one rate, by its name: a win is better by all of them. ``joint`` is there
    anyhow, of every judge that scores and has a weight, unless it is given here. To tell judges that an agent
    was trained by from others: ``{joint: [helpful, harmless], others: [helpful2, harmless2]}``."""
    baseline: str
    """The system that every other one is compared with."""
    pairs: tuple[tuple[str, str], ...] = ()
    """More pairs of systems to compare."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Prompts longer than this, after templating, are refused."""
    seed: int = Field(default=0, ge=0)
    """Of everything that is sampled, and of the intervals."""
    num_samples: int = Field(default=6, ge=0)
    """Prompts of each data set whose answers the report shows side by side. Usual range 2–20."""
    num_actors: int = Field(default=1, ge=1)
    """Processes that answer and score, each with its own copy of the LLM."""
    rows: int = Field(default=64, ge=1)
    """Answers decoded at the same time by one actor. Usual range 16–128."""
    prompts_per_chunk: int = Field(default=32, ge=1)
    """Prompts handed to an actor at a time. Usual range 8–128."""
    max_attempts: int = Field(default=3, ge=1)
    """Times a chunk of prompts is tried when the actors that work on it die."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores Ray reserves for one actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or a fraction of one, that Ray reserves for one actor."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of one actor's arithmetic on the CPU."""
    ray: RayConfig = RayConfig()
    """Where the processes run."""
    dir: UserPath = Field(default_factory=lambda: Path("runs").resolve())
    """Where the folder of the comparison is made. Relative to the current folder."""
    name: str | None = Field(default=None, pattern=RUN_NAME)
    """First part of that folder's name; the time follows. None: the name of the configuration file."""

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonConfig:
        for mistake in _mistakes(self):
            raise ValueError(mistake)
        return self

    @property
    def compared(self) -> list[tuple[str, str]]:
        """Every pair of systems that is compared: each with the baseline, then ``pairs``."""
        with_baseline = [(name, self.baseline) for name in self.systems if name != self.baseline]
        return list(dict.fromkeys([*with_baseline, *self.pairs]))

    @property
    def scoring_judges(self) -> dict[str, RewardHeadConfig | RewardModelConfig]:
        """The judges that score answers one by one, with their weights."""
        return {n: judge for n, judge in self.judges.items() if not isinstance(judge, LLMJudgeConfig)}

    @property
    def joint_rates(self) -> dict[str, tuple[str, ...]]:
        """The rates that several judges give together, and which judges: ``juries`` and ``joint``."""
        weighted = tuple(name for name, judge in self.scoring_judges.items() if judge.weight != 0)
        joint = {JOINT: weighted} if weighted else {}
        return joint | self.juries

    @property
    def llm_judges(self) -> dict[str, LLMJudgeConfig]:
        """The judges that compare two answers."""
        return {n: judge for n, judge in self.judges.items() if isinstance(judge, LLMJudgeConfig)}

    @property
    def waves(self) -> list[list[str]]:
        """The systems that answer, in the order they can: a corrector after the one that it corrects."""
        waves: list[list[str]] = []
        for name in self.systems:
            depth = _depth(self.systems, name)
            while len(waves) <= depth:
                waves.append([])
            waves[depth].append(name)
        return waves

    @property
    def ways(self) -> list[DecodingConfig]:
        """How each agent is used."""
        agents = [system for system in self.systems.values() if isinstance(system, AgentSystem)]
        return [agent.used_in(self.decoding) for agent in agents]

    def llm_of(self, name: str) -> tuple[LLMConfig, Path | None]:
        """The LLM that a system answers with, and its adapter."""
        system = self.systems[name]
        if not isinstance(system, LLMSystem | AgentSystem | CorrectorSystem):
            return self.llm, None
        if system.model is None or system.model == self.llm.model:
            return self.llm, system.adapter
        other = {"model": system.model, "gguf_file": None, "revision": None, "chat_template": None}
        return self.llm.model_copy(update=other), system.adapter


def fill_template(template: str, prompt: str, response: str) -> str:
    """``template`` with question and answer in place; braces within those stay as they are."""
    values = {"prompt": prompt, "response": response}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _depth(systems: Mapping[str, Any], name: str) -> int:
    """Corrections behind a system's answers; -1 where it corrects itself in the end."""
    seen = [name]
    while isinstance(system := systems[seen[-1]], CorrectorSystem):
        if system.of in seen:
            return -1
        seen.append(system.of)
    return len(seen) - 1


def _mistakes(config: ComparisonConfig) -> Iterator[str]:
    """What does not fit together: field, value, remedy."""
    systems, known = config.systems, ", ".join(config.systems)
    if config.baseline not in systems:
        yield f"baseline={config.baseline} is not a system; there are {known or 'none'}"
    if len(systems) < 2:
        yield f"systems has {known} alone; add another to compare with"
    for pair in config.pairs:
        if unknown := [name for name in pair if name not in systems]:
            yield f"pairs: {unknown[0]} is not a system; there are {known}"
        if pair[0] == pair[1]:
            yield f"pairs: {pair[0]} is compared with itself; name two systems"
    for name in RESERVED:
        if name in config.judges:
            yield f"judges.{name}: the report has something else by that name; give the judge another"
    for name, judges in config.juries.items():
        if name in config.judges or name in set(RESERVED) - {JOINT}:
            yield f"juries.{name}: the report has something else by that name; give the jury another"
        yield from _bad_judges(config, f"juries.{name}", judges)
        if idle := [
            judge
            for judge in judges
            if judge in config.scoring_judges and not config.scoring_judges[judge].weight
        ]:
            yield f"juries.{name}: {idle[0]} has the weight 0, so it counts for nothing; leave it out"
    for name, system in systems.items():
        if isinstance(system, CorrectorSystem):
            if system.of not in systems:
                yield f"systems.{name}.of={system.of} is not a system; there are {known}"
            if _depth(systems, name) < 0:
                yield f"systems.{name}.of={system.of} comes back to itself; correct a system that answers"
        if isinstance(system, AgentSystem):
            used = system.used_in(config.decoding)
            if used.conflict is not None:
                yield f"systems.{name}: {used.conflict}"
            for setting in used.idle:
                if getattr(system, setting, None) is not None:
                    yield (
                        f"systems.{name}.{setting} changes nothing by {used.steering}; leave it out, or give "
                        "the system another steering"
                    )
        if isinstance(system, BestOfNSystem):
            field, scoring = f"systems.{name}.judges", config.scoring_judges
            yield from _bad_judges(config, field, system.judges)
            if all(scoring[judge].weight == 0 for judge in system.judges if judge in scoring):
                yield f"{field}: every weight is 0; give at least one another value"
        if getattr(system, "adapter", None) is not None and config.llm.quantization != "none":
            yield f"systems.{name}.adapter cannot be merged into packed weights; use llm.quantization=none"
    if config.num_cpus == 0 and config.num_gpus == 0:
        yield "num_cpus and num_gpus are both 0; give each actor a part of one"


def _bad_judges(config: ComparisonConfig, field: str, judges: Sequence[str]) -> Iterator[str]:
    """Those that do not score."""
    scoring = config.scoring_judges
    if not judges:
        yield f"{field} names no judge; name one that scores, or leave it out"
    for judge in judges:
        if judge in scoring:
            continue
        why = "compares two answers, it does not score" if judge in config.judges else "is not a judge"
        there_are = f"there are {', '.join(scoring)}" if scoring else "add one under judges"
        yield f"{field}: {judge} {why}; {there_are}"
