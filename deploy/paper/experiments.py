"""The tables and figures of the paper, as commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mara.deploy.config_file import CONFIGS_DIR, read_content

FOLDER = "runs/paper"
"""Where the commands put runs and comparisons, one folder for each agent."""
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
TABLE_5_LOG_BYTES = 128 << 30


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
