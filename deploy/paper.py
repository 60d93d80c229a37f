"""``mara paper``: the commands that make the tables and figures of the paper, and what they would cost.

Some have a twin of a small LLM, for two CPU cores.
Nothing is started here. A run's folder is found again by ``run.dir`` and the link ``latest`` in it. What a
command costs is counted from the settings it has and from rates that are assumed. Imports no torch.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import Field

from mara.common.config import Config
from mara.common.errors import UserError
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.config import RunConfig
from mara.deploy.config_file import CONFIGS_DIR, find_config, load_comparison, load_config, read_content

FOLDER = "runs/paper"
"""Where the commands put runs and comparisons, one folder for each agent."""
SCALED_FOLDER = "runs/scaled"
"""The same for the twins, in it one folder for each seed."""
LLMS = (
    "llama-3-8b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b-v0.1",
    "mistral-7b-v0.2",
    "mistral-7b-v0.3",
)
"""The upstream LLMs of Table 1 by the names of their configurations in ``paper/``."""
BILLIONS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.0,
    "meta-llama/Llama-3.1-8B-Instruct": 8.0,
    "meta-llama/Llama-3.2-1B-Instruct": 1.2,
    "meta-llama/Llama-3.2-3B-Instruct": 3.2,
    "mistralai/Mistral-7B-Instruct-v0.1": 7.2,
    "mistralai/Mistral-7B-Instruct-v0.2": 7.2,
    "mistralai/Mistral-7B-Instruct-v0.3": 7.2,
    "aligner/aligner-7b-v1.0": 6.7,
}
"""Parameters of the LLMs. Others, those of the user, count as the base LLM of their comparison."""
RATED_BILLIONS = 8.0
"""The size of LLM that the rates are of."""
TABLE_5_LOG_BYTES = 128 << 30
TRANSITION_BYTES = 2 * 4096
"""Of a decision in the log: the state of an LLM of hidden size 4096, in 16 bit."""
NUM_SYSTEMS_OF_A_RUN = 3
"""What ``mara eval RUN`` has answer: the LLM greedy, with the agent, and sampled."""


class Rates(Config):
    """What a plan assumes. ``mara bench`` measures the first three on a machine of yours."""

    tokens_per_s: float = Field(default=1000.0, gt=0)
    """Tokens a second that one GPU decodes with an LLM of 8 B, many answers at a time; inverse to size."""
    single_tokens_per_s: float = Field(default=30.0, gt=0)
    """The same, one answer at a time."""
    step_s: float = Field(default=0.01, gt=0)
    """Duration of a gradient step, seconds."""
    scores_per_s: float = Field(default=20.0, gt=0)
    """Answers a second that one reward model of 7 B scores."""
    training_tokens: float = Field(default=300.0, gt=0)
    """Tokens of an answer in training, on average."""
    evaluation_tokens: float = Field(default=400.0, gt=0)
    """Tokens of an answer in a comparison, on average."""
    decisions_per_token: float = Field(default=2.0, gt=0)
    """Candidates that the agent decides on for a token of training; the size of a log follows from it."""
    start_s: float = Field(default=300.0, ge=0)
    """Time in which a command loads its models, seconds."""


class Step(NamedTuple):
    """One command."""

    command: str
    """As it is typed."""
    of: str | None = None
    """What a run that the command evaluates was trained with, as a command."""


class Experiment(NamedTuple):
    """What makes one table or figure."""

    title: str
    steps: Callable[[], Iterator[Step]]
    notes: tuple[str, ...] = ()
    """What to know before, a line each."""


class Twin(NamedTuple):
    """The same of a small LLM, in minutes on two CPU cores."""

    title: str
    steps: Callable[[int], Iterator[Step]]
    """From the seed of its trainings."""
    notes: tuple[str, ...] = ()
    """What to know before, a line each."""


class Cost(NamedTuple):
    """What a command takes."""

    num_gpus: int
    seconds: float
    slowest: str = ""
    """Of a training, the part that takes so long."""
    log_bytes: float = 0.0
    """Of the episodes that it keeps; 0 where it keeps none."""


def find_experiment(name: str) -> Experiment:
    """The experiment ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}"
    raise UserError(f"no such experiment {name!r}; {remedy}")


def find_twin(name: str, seed: int) -> Experiment:
    """The experiment ``name`` on a small LLM, its trainings with ``seed``.

    Raises:
        UserError: there is no experiment of that name, or it has no twin.
    """
    find_experiment(name)
    if name not in TWINS:
        raise UserError(f"{name} has no scaled twin; {', '.join(TWINS)} have one")
    twin = TWINS[name]
    return Experiment(twin.title, lambda: twin.steps(seed), twin.notes)


def lines(experiment: Experiment, rates: Rates | None) -> Iterator[str]:
    """A shell script that makes ``experiment``; with ``rates`` the costs stand in its comments."""
    yield f"# {experiment.title}"
    yield "# Run it with mara on the PATH (PATH=$PWD/.venv/bin:$PATH); it ends where a command fails."
    yield "set -e"
    for note in experiment.notes:
        yield f"# {note}"
    yield "# Experiments share trainings: leave one out where the latest run in its run.dir is there already."
    total_s = gpu_s = 0.0
    num_counted = 0
    for step in experiment.steps():
        yield step.command
        if rates is None or (cost := cost_of(step, rates)) is None:
            continue
        yield f"#   {_cost_in_words(cost)}"
        num_counted += 1
        total_s += cost.seconds
        gpu_s += cost.num_gpus * cost.seconds
    if rates is not None:
        yield (
            f"# in all {num_counted} runs: {total_s / 3600:.1f} h one after the other, "
            f"{gpu_s / 3600:.1f} GPU hours; benchmarks take minutes and are not counted"
        )
        yield from (f"# {line}" for line in assumptions(rates))


def assumptions(rates: Rates) -> Iterator[str]:
    """What a plan rests on, a line each."""
    yield (
        "These are assumptions, not measurements; put figures of `mara bench rollout`, `decode` and "
        "`learner` in their place:"
    )
    for name, field in Rates.model_fields.items():
        text = " ".join((field.description or "").split()).rstrip(".")
        yield f"  {name}={getattr(rates, name):g}: {text[:1].lower() + text[1:]}"
    yield (
        "Decoding, scoring and learning go on at the same time: a training takes as long as the slowest of "
        "the three. Where that is learning, the last steps are done when all episodes are there."
    )


def cost_of(step: Step, rates: Rates) -> Cost | None:
    """What ``step`` takes by its settings; None for a benchmark, which takes minutes.

    Raises:
        UserError: its settings are wrong.
    """
    match settings_of(step):
        case RunConfig() as config if shlex.split(step.command)[1] == "train":
            return _training_cost(config, rates)
        case RunConfig() as config:
            return _evaluation_cost(config, rates)
        case ComparisonConfig() as comparison:
            return _comparison_cost(comparison, rates)
    return None


def settings_of(step: Step) -> RunConfig | ComparisonConfig | None:
    """What a command would go by, its overrides included; None for a benchmark.

    Raises:
        UserError: its settings are wrong.
    """
    _, command, *words = shlex.split(step.command)
    if command == "bench":
        return None
    if "--out" in words:
        place = words.index("--out")
        words = words[:place] + words[place + 2 :]
    name, *overrides = words
    if step.of is not None:
        _, _, name, *of_training = shlex.split(step.of)
        return load_config(find_config(name), [*of_training, *overrides])
    if command == "train":
        return load_config(find_config(name), overrides)
    return load_comparison(find_config(name, is_comparison=True), overrides)


def _training_cost(config: RunConfig, rates: Rates) -> Cost:
    num_episodes, rollout = config.learner.num_episodes, config.rollout
    learner_s = num_episodes * config.learner.gradient_steps_per_episode * rates.step_s
    if config.replay.from_run is not None:
        return Cost(1, rates.start_s + learner_s, "learning")
    num_tokens = num_episodes * rates.training_tokens
    rollout_s = num_tokens / (rollout.num_actors * _tokens_per_s(config.llm.model, rates))
    scoring_s = max(
        (num_episodes / (one.replicas * rates.scores_per_s) for one in config.reward_models.values()),
        default=0.0,
    )
    log_bytes = 0.0
    if config.replay.durable:
        log_bytes = num_tokens * rates.decisions_per_token * TRANSITION_BYTES
    num_gpus = math.ceil(rollout.num_actors * rollout.num_gpus + config.reward_gpus)
    parts = {"decoding": rollout_s, "scoring": scoring_s, "learning": learner_s}
    slowest = max(parts, key=parts.__getitem__)
    return Cost(num_gpus, rates.start_s + parts[slowest], slowest, log_bytes)


def _comparison_cost(config: ComparisonConfig, rates: Rates) -> Cost:
    num_prompts = sum(dataset.num_prompts or 0 for dataset in config.datasets.values())
    answers_s = 0.0
    for name in config.systems:
        model = config.llm_of(name)[0].model
        model = model if model in BILLIONS else config.llm.model
        tokens_per_s = _tokens_per_s(model, rates, is_single=config.rows == 1)
        answers_s += num_prompts * rates.evaluation_tokens / tokens_per_s
    num_scores = num_prompts * len(config.systems) * len(config.scoring_judges)
    work_s = answers_s + num_scores / rates.scores_per_s
    num_gpus = math.ceil(config.num_actors * config.num_gpus)
    return Cost(num_gpus, rates.start_s + work_s / config.num_actors)


def _evaluation_cost(config: RunConfig, rates: Rates) -> Cost:
    num_answers = NUM_SYSTEMS_OF_A_RUN * (config.evaluation.num_prompts or 0)
    answers_s = num_answers * rates.evaluation_tokens / _tokens_per_s(config.llm.model, rates)
    scores_s = num_answers * len(config.reward_models) / rates.scores_per_s
    return Cost(1, rates.start_s + answers_s + scores_s)


def _tokens_per_s(model: str, rates: Rates, *, is_single: bool = False) -> float:
    rate = rates.single_tokens_per_s if is_single else rates.tokens_per_s
    return rate * RATED_BILLIONS / BILLIONS.get(model, RATED_BILLIONS)


def _cost_in_words(cost: Cost) -> str:
    hours = cost.seconds / 3600
    text = f"{cost.num_gpus} GPU{'s' if cost.num_gpus > 1 else ''} × {hours:.2f} h"
    if cost.slowest:
        text += f", which {cost.slowest} takes"
    if cost.log_bytes:
        text += f"; keeps {cost.log_bytes / 1e9:.0f} GB of episodes, in memory and on disk"
    return text


# The experiments


def _train(llm: str, *overrides: str, into: str | None = None) -> str:
    return " ".join([f"mara train paper/{llm} run.dir={FOLDER}/{into or llm}", *overrides])


def _agent(name: str) -> str:
    return f"{FOLDER}/{name}/latest"


def _compare(config: str, llm: str, agent: str, into: str, *overrides: str) -> str:
    words = [
        f"mara eval paper/{config} llm.model={_model(llm)} systems.mara.path={_agent(agent)}",
        *overrides,
        f"--out {FOLDER}/{into}",
    ]
    return " ".join(words)


def _model(llm: str) -> str:
    return str(read_content(CONFIGS_DIR / "paper" / f"{llm}.yaml")["llm"]["model"])


def _yours(llm: str, *systems: str) -> list[str]:
    return [f"systems.{system}.model=YOUR/{llm}-{system}" for system in systems]


def _table1() -> Iterator[Step]:
    for llm in LLMS:
        yield Step(_train(llm))
        yield Step(_compare("compare", llm, llm, f"table1-{llm}"))


def _table2() -> Iterator[Step]:
    for llm in LLMS:
        yield Step(_train(llm))
        yield Step(_compare("baselines", llm, llm, f"table2-{llm}", *_yours(llm, "rlhf", "dpo")))


def _table3() -> Iterator[Step]:
    others = ("mistral-7b-v0.3", "mistral-7b-v0.2", "mistral-7b-v0.1")
    for trained in ("llama-3.1-8b", "mistral-7b-v0.3"):
        yield Step(_train(trained))
        for llm in ("llama-3.1-8b", "llama-3-8b", *others):
            yield Step(_compare("compare", llm, trained, f"table3-{trained}-on-{llm}"))


def _table4() -> Iterator[Step]:
    llm = "llama-3.1-8b"
    for data, train, test in (("HH-RLHF", "train", "test"), ("UltraFeedback", "train_prefs", "test_prefs")):
        name = f"{llm}-{data.lower()}"
        yield Step(
            _train(
                llm,
                f"prompts.train=hub:{data}#{train}",
                f"prompts.evaluation=hub:{data}#{test}",
                "rollout.max_prompt_tokens=8192",
                "rollout.rows=32",
                into=name,
            )
        )
        yours = _yours(name, "sft", "rlhf", "dpo")
        yield Step(_compare("table4", llm, name, f"table4-{name}", f"datasets.held_out.hub={data}", *yours))


def _table5() -> Iterator[Step]:
    for llm in LLMS:
        if not llm.startswith("mistral"):
            continue
        yield Step(_train(llm, "replay.durable=true", f"replay.log_max_bytes={TABLE_5_LOG_BYTES}"))
        yield Step(_compare("compare", llm, llm, f"table5-{llm}-2-1"))
        for reward, cost in ((1, 0), (0, 1), (1, 1)):
            name = f"{llm}-{reward}-{cost}"
            yield Step(
                _train(
                    llm,
                    f"replay.from={_agent(llm)}",
                    "rollout.num_actors=0",
                    f"rewards.helpful.weight={reward}",
                    f"rewards.harmless.weight={-cost}",
                    into=name,
                )
            )
            yield Step(_compare("compare", llm, name, f"table5-{name}"))


def _figure3() -> Iterator[Step]:
    training = _train("llama-3.2-1b")
    yield Step(training)
    for top_k in (10, 20, 40):
        for top_p in (0.8, 0.9, 0.95):
            sets = f"decoding.truncation.top_k={top_k} decoding.truncation.top_p={top_p}"
            yield Step(f"mara eval {_agent('llama-3.2-1b')} {sets} decoding.max_new_tokens=2048", of=training)


def _speed() -> Iterator[Step]:
    llm = "llama-3.1-8b"
    yield Step(_train(llm))
    yield Step(f"mara bench decode {_agent(llm)} --batch 1 --json {FOLDER}/speed-decode.json")
    yield Step(f"mara bench rollout {_agent(llm)} --json {FOLDER}/speed-rollout.json")
    yield Step(f"mara bench learner --json {FOLDER}/speed-learner.json")
    few = [f"datasets.{name}.num_prompts=10" for name in ("SafeRLHF", "BeaverTails", "HarmfulQA")]
    yield Step(_compare("aligner", llm, llm, "speed-aligner", "rows=1", "num_actors=1", *few))


_YOURS = "Put models of yours where YOUR/ stands: the paper trained them with LLaMA-Factory."
EXPERIMENTS = {
    "table1": Experiment("Table 1: agents against their LLMs, seven LLMs, three data sets", _table1),
    "table2": Experiment("Table 2: agents against RLHF, DPO and Aligner", _table2, (_YOURS,)),
    "table3": Experiment(
        "Table 3: agents of two LLMs steer other LLMs",
        _table3,
        ("A line says that an agent was trained for another LLM: that is what is asked here.",),
    ),
    "table4": Experiment("Table 4: agents trained on HH-RLHF and UltraFeedback", _table4, (_YOURS,)),
    "table5": Experiment(
        "Table 5: other weights of the reward and the cost model",
        _table5,
        (
            "The first training of each LLM, 2:1 as for Table 1, keeps all its episodes, of which the other "
            "ratios are trained.",
            "The paper sampled anew for each. To do so, leave out replay.from and rollout.num_actors=0.",
        ),
    ),
    "figure3": Experiment(
        "Figure 3: places of accepted candidates under k and p, Llama 3.2-1B on SafeRLHF",
        _figure3,
        (
            "Each evaluation prints the places and keeps them in report.json (accepted_ranks), an earlier "
            "report beside it, and draws accepted_positions_by_candidates.png of all.",
            "One agent, trained at k 40 and p 0.95; the other values of k and p are ours.",
        ),
    ),
    "speed": Experiment(
        "Section 4.2: tokens/s with the agent and with Aligner, one answer at a time",
        _speed,
        ("The comparison's report has the tokens/s of each system; Aligner's count from its draft on.",),
    ),
}


# Their twins

RATIOS = {"0-1": (0, 2), "1-1": (1, 1), "2-1": (1.333, 0.667), "1-0": (2, 0)}
"""Of Table 5, from harmless to helpful, as the weights of both. They add up to 2 everywhere, as in the
quickstart: other sums would also change what the entropy and the divergence count beside the rewards."""


def _scaled(seed: int, name: str) -> str:
    return f"{SCALED_FOLDER}/seed-{seed}/{name}"


def _train_scaled(seed: int, name: str, *overrides: str) -> Step:
    words = [
        f"mara train quickstart run.dir={_scaled(seed, name)} run.seed={seed}",
        "evaluation.after_training=false",
        *overrides,
    ]
    return Step(" ".join(words))


def _quickstart(seed: int) -> Step:
    return _train_scaled(seed, "quickstart", "replay.durable=true")


def _scaled_agent(seed: int, name: str) -> str:
    return f"{_scaled(seed, name)}/latest"


def _table3_scaled(seed: int) -> Iterator[Step]:
    yield _quickstart(seed)
    agent, tuned = _scaled_agent(seed, "quickstart"), "YOUR/smollm2-adapter"
    words = [
        f"mara eval scaled/table3 systems.mara.path={agent} systems.mara_on_tuned.path={agent}",
        f"systems.tuned.adapter={tuned} systems.mara_on_tuned.adapter={tuned}",
        f"--out {_scaled(seed, 'table3')}",
    ]
    yield Step(" ".join(words))


def _table5_scaled(seed: int) -> Iterator[Step]:
    yield _quickstart(seed)
    log = _scaled_agent(seed, "quickstart")
    agents = [f"systems.live.path={log}"]
    for ratio, (helpful, harmless) in RATIOS.items():
        yield _train_scaled(
            seed,
            f"ratio-{ratio}",
            f"replay.from={log}",
            "rollout.num_actors=0",
            f"rewards.helpful.weight={helpful:g}",
            f"rewards.harmless.weight={harmless:g}",
        )
        agents.append(f"systems.ratio-{ratio}.path={_scaled_agent(seed, f'ratio-{ratio}')}")
    yield Step(f"mara eval scaled/table5 {' '.join(agents)} --out {_scaled(seed, 'table5')}")


def _figure3_scaled(seed: int) -> Iterator[Step]:
    training = _quickstart(seed)
    yield training
    for top_k in (3, 5, 10):
        for top_p in (0.8, 0.9, 0.95):
            sets = f"decoding.truncation.top_k={top_k} decoding.truncation.top_p={top_p}"
            command = f"mara eval {_scaled_agent(seed, 'quickstart')} {sets} evaluation.num_prompts=60"
            yield Step(command, of=training.command)


TWINS = {
    "table3": Twin(
        "Table 3, scaled: the quickstart's agent on a fine-tuned LLM of the same hidden size",
        _table3_scaled,
        (
            "Put a PEFT adapter of yours for SmolLM2-135M-Instruct where YOUR/ stands; of a whole model say "
            "systems.NAME.model=FOLDER in place of systems.NAME.adapter.",
            "The judges read all answers with SmolLM2-135M-Instruct itself, for which they were fitted.",
        ),
    ),
    "table5": Twin(
        "Table 5, scaled: other weights of the two rewards, from the log of one quickstart",
        _table5_scaled,
        ("More prompts: add such as datasets.SafeRLHF.hub=SafeRLHF datasets.SafeRLHF.num_prompts=200.",),
    ),
    "figure3": Twin(
        "Figure 3, scaled: places of accepted candidates of the quickstart's agent under k and p",
        _figure3_scaled,
        (
            "Each evaluation draws accepted_positions_by_candidates.png of all so far into the run's folder.",
            "One agent, trained at k 5 and p 0.95.",
        ),
    ),
}
"""Of :data:`EXPERIMENTS`, by the same names."""
