"""The learner finds the best policy of a small task whose optimum is known.

An answer has three tokens of three candidates each, offered in a fixed order; the last of a position is
forced. The value of a token depends on its place and on the token before it, so taking the best one now is
not always best. The answer's score, paid at its end, is the sum. The best score comes from trying all 27.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.memory import MemoryEpisodeLog, MemoryWeightChannel
from mara.common.agent import Agent
from mara.common.config import AgentConfig
from mara.common.contracts import ReadCounts
from mara.common.episode import Episode
from mara.common.seeding import derive_seed, generator
from mara.learner.config import LearnerConfig, SACConfig
from mara.learner.loop import Learner

NUM_POSITIONS, NUM_CANDIDATES = 3, 3
PREFIXES = [p for n in range(NUM_POSITIONS) for p in itertools.product(range(NUM_CANDIDATES), repeat=n)]
NUM_STATES = len(PREFIXES) * NUM_CANDIDATES
EPISODES_PER_ROUND = 8


class Task:
    """Values [position, token before, token] drawn by the seed."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.values = rng.uniform(0, 1, (NUM_POSITIONS, NUM_CANDIDATES, NUM_CANDIDATES))

    def score(self, answer: tuple[int, ...]) -> float:
        before = (0, *answer)
        return float(sum(self.values[i, before[i], token] for i, token in enumerate(answer)))

    def best_score(self) -> float:
        answers = itertools.product(range(NUM_CANDIDATES), repeat=NUM_POSITIONS)
        return max(self.score(answer) for answer in answers)


def state_index(answer: tuple[int, ...], candidate: int) -> int:
    """Which of the 39 states: the answer so far and the candidate, as an LLM's hidden state knows both."""
    return PREFIXES.index(answer) * NUM_CANDIDATES + candidate


def decide_everywhere(agent: Agent) -> np.ndarray:
    """Log-probabilities [39, 2] at every state, each state a unit vector."""
    with torch.no_grad():
        return agent(torch.eye(NUM_STATES)).numpy()


def greedy_answer(agent: Agent) -> tuple[int, ...]:
    logprobs = decide_everywhere(agent)
    answer: tuple[int, ...] = ()
    while len(answer) < NUM_POSITIONS:
        candidate = 0
        while candidate < NUM_CANDIDATES - 1:
            reject, accept = logprobs[state_index(answer, candidate)]
            if accept >= reject:
                break
            candidate += 1
        answer += (candidate,)
    return answer


class ToyActor:
    """An episode source that samples a round of answers whenever the learner has nothing left to do.

    In step with the learner, so the run is reproducible; through the real log and weight channel.
    """

    counts = ReadCounts()
    waited_s = 0.0

    def __init__(self, task: Task, agent: Agent, channel: MemoryWeightChannel, seed: int) -> None:
        self.task, self.agent, self.channel, self.version = task, agent, channel, -1
        self.log = MemoryEpisodeLog()
        self.reader = self.log.reader()
        self.generator = generator(seed, "toy")
        self.uids: Iterator[int] = itertools.count()

    @property
    def cursor(self) -> str:
        return self.reader.cursor

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        if timeout_s == 0:
            return []
        newer = self.channel.fetch_newer(self.version)
        if newer is not None:
            self.agent.load_state_dict(newer.tensors)
            self.version = newer.version
        logprobs = decide_everywhere(self.agent)
        self.log.append([self._episode(logprobs) for _ in range(min(EPISODES_PER_ROUND, max_episodes))])
        return self.reader.read(max_episodes, timeout_s)

    def _episode(self, logprobs: np.ndarray) -> Episode:
        answer: tuple[int, ...] = ()
        rows: list[tuple[int, int, int, int, bool, float, float]] = []
        while len(answer) < NUM_POSITIONS:
            for candidate in range(NUM_CANDIDATES):
                index = state_index(answer, candidate)
                forced = candidate == NUM_CANDIDATES - 1
                reject, accept = (-np.inf, 0.0) if forced else logprobs[index]
                action = int(torch.rand((), generator=self.generator).item() < np.exp(accept))
                rows.append((len(answer), index, candidate, action, forced, accept, reject))
                if action:
                    answer += (candidate,)
                    break
        columns = list(zip(*rows, strict=True))
        return Episode(
            uid=str(next(self.uids)),
            prompt_id="0",
            actor_id="toy",
            prompt_ids_P=np.zeros(1, np.int32),
            response_ids_N=np.asarray(answer, np.int32),
            states_TD=torch.eye(NUM_STATES)[list(columns[1])].bfloat16(),
            actions_T=np.asarray(columns[3], np.uint8),
            ranks_T=np.asarray(columns[2], np.int16),
            num_candidates_T=np.full(len(rows), NUM_CANDIDATES, np.int16),
            positions_T=np.asarray(columns[0], np.int32),
            forced_T=np.asarray(columns[4], bool),
            reference_logprobs_T=np.full(len(rows), -np.log(NUM_CANDIDATES), np.float32),
            accept_logprobs_T=np.asarray(columns[5], np.float32),
            reject_logprobs_T=np.asarray(columns[6], np.float32),
            policy_versions_T=np.full(len(rows), self.version, np.int64),
            finish_reason="length",
            started_at_s=0.0,
            finished_at_s=0.0,
            scores={"value": self.task.score(answer)},
        )


def train(seed: int) -> tuple[Task, Agent, Learner]:
    task = Task(derive_seed(seed, "task"))
    agent_config = AgentConfig(widths=(64, 32))
    channel = MemoryWeightChannel()
    actor = ToyActor(task, Agent(NUM_STATES, agent_config), channel, seed)
    config = LearnerConfig(
        sac=SACConfig(
            critic_widths=(64, 32),
            critic_learning_rate=3e-3,
            policy_learning_rate=1e-3,
            temperature_learning_rate=3e-3,
            initial_temperature=0.2,
            target_entropy_fraction=0.15,
            polyak=0.05,
            target_update_period=2,
            max_gradient_norm=5.0,
            critic_only_steps=50,
        ),
        batch_size=128,
        num_episodes=500,
        gradient_steps_per_episode=0.75,
        start_batches=2,
        publish_period_s=0,
        device="cpu",
    )
    shaping = ShapingConfig(score_weights={"value": 1.0}, kl_weight=0.0, discount=1.0)
    learner = Learner(
        config,
        agent_config,
        ReplayConfig(capacity_transitions=5000),
        shaping,
        hidden_size=NUM_STATES,
        source=actor,
        weights=channel,
        seed=seed,
    )
    learner.run()
    return task, learner.sac.agent, learner


@pytest.mark.parametrize("seed", [0, 1])
def test_the_trained_agent_reaches_95_percent_of_the_best_score(seed: int) -> None:
    task, agent, learner = train(seed)
    first_candidates = task.score((0, 0, 0))
    reached = task.score(greedy_answer(agent))
    print(
        f"best {task.best_score():.3f} reached {reached:.3f} first {first_candidates:.3f}",
        learner.gradient_step,
    )
    assert reached >= 0.95 * task.best_score() > first_candidates
