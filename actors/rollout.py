"""A rollout actor: answers prompts with the frozen LLM and the agent, scores the answers, logs the episodes.

    prompts ──► Engine (frozen LLM + agent) ──► finished answers ──► reward heads ──► Episode ──► EpisodeSink
                              ▲                                            └─► Scorer ──┘
                      WeightSource, looked at between two decoding steps

The actor waits for nobody: weights are taken when there are newer ones, answers are handed to a scorer where
other reward models than heads are asked, episodes to a sink, which keeps them while the store is away. If
that lasts too long, :class:`mara.common.errors.ReplayUnavailable` ends the actor.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from mara.actors.config import DecodingConfig, LLMConfig, RolloutConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Generation, Request
from mara.actors.decoding.policies import AgentPolicy
from mara.actors.decoding.prefill import common_prefix
from mara.actors.heads import RewardHead, load_head
from mara.actors.llm import LLM, load_llm
from mara.actors.prompts import Prompt, endless
from mara.actors.scoring import Judge, Scorer, Unscored
from mara.common.agent import Agent, why_unfit
from mara.common.config import AgentConfig
from mara.common.contracts import Conversation, EpisodeSink, WeightSource
from mara.common.episode import Episode
from mara.common.errors import DamagedWeights, UserError
from mara.common.seeding import derive_seed

logger = logging.getLogger(__name__)

WEIGHTS_WAIT_S = 0.05
MIN_FAILURES = 64
SCORER_STOP_S = 1.0
"""How long an actor that ends waits for the scores that are on their way, seconds."""


class RolloutWorker:
    """Samples episodes until it is told to stop. Constructing it loads the LLM.

    Args:
        rewards: folder of each reward head, by the name its score gets in the episode.
        prompts: answered in random order, again and again.
        actor_id: recorded in every episode; with ``seed`` it fixes the actor's random streams.
        judges: the other reward models, by the name their score gets.

    Raises:
        UserError: the LLM, a head or a prompt does not fit.
    """

    def __init__(
        self,
        llm_config: LLMConfig,
        decoding: DecodingConfig,
        rollout: RolloutConfig,
        agent_config: AgentConfig,
        rewards: Mapping[str, Path],
        prompts: Sequence[Prompt],
        sink: EpisodeSink,
        weights: WeightSource,
        actor_id: str,
        seed: int,
        judges: Mapping[str, Judge] = MappingProxyType({}),
    ) -> None:
        self.actor_id = actor_id
        self._rollout = rollout
        self._sink = sink
        self._weights = weights
        self._seed = derive_seed(seed, "rollout", actor_id)
        self._llm = load_llm(llm_config, pack=not decoding.compile)
        self._heads = {name: load_head(path, self._llm.hidden_size) for name, path in rewards.items()}
        self._prompt_ids = render_prompts(self._llm, prompts, rollout.max_prompt_tokens)
        self._prompts = prompts
        # In training mode a module refuses nothing, but the agent is only ever read here.
        self._policy = AgentPolicy(
            Agent(self._llm.hidden_size, agent_config).eval(), threshold=None, version=-1
        )
        self._policy.agent.to(self._llm.device).requires_grad_(False)
        self._engine = Engine(
            self._llm.model,
            self._llm.eos_ids,
            decoding,
            self._policy,
            num_rows=rollout.rows,
            max_prompt_tokens=max(map(len, self._prompt_ids.values())),
            shared_prefix=common_prefix(list(self._prompt_ids.values())),
        )
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(
            ("tokens", "episodes", "decisions", "scores_failed", "weights_refused"), 0
        )
        self._waiting_s = 0.0
        self._busy_s = 0.0
        self._publish_to_applied_s = 0.0
        self._looked_for_weights_at = -1e9
        self._refused_version: int | None = None
        self._scorer = Scorer(judges, self._hand_over, rollout.max_unscored) if judges else None

    def run(self, should_stop: threading.Event) -> None:
        """Decode, score and log until ``should_stop`` is set. Blocks.

        Raises:
            UserError: the first weights that come do not fit, most answers cannot be scored, or a reward
                model gives no scores any more.
        """
        try:
            self._run(should_stop)
        finally:
            if self._scorer is not None:
                self._scorer.close(SCORER_STOP_S)

    def _run(self, should_stop: threading.Event) -> None:
        asked = (
            prompt
            for prompt in endless(self._prompts, self._seed)
            for _ in range(self._rollout.answers_per_prompt)
        )
        requests = (
            Request(self._prompt_ids[prompt.id], seed=derive_seed(self._seed, number), tag=(prompt, number))
            for number, prompt in enumerate(asked)
        )
        self._wait_for_first_weights(should_stop)
        while not should_stop.is_set():
            started = time.monotonic()
            self._take_newer_weights()
            # Prompts enter a few at a time: one prefill of several costs little more than one of one.
            if self._engine.wants_prompts:
                self._engine.admit(list(itertools.islice(requests, self._engine.num_free)))
            answers = self._score(self._engine.step())
            scored = time.monotonic()
            if self._scorer is not None:
                self._scorer.submit(answers)
            elif answers:
                self._hand_over([answer.episode for answer in answers])
            with self._lock:
                ended = time.monotonic()
                self._busy_s += ended - started
                # Handing answers over is all that others can make longer: a sink that waits for the store.
                self._waiting_s += ended - scored

    def metrics(self) -> dict[str, float]:
        """Counters since the start. May be called from another thread at any time."""
        scorer = self._scorer
        with self._lock:
            total_s = max(self._busy_s, 1e-9)
            return {
                "rollout/tokens_total": self._counts["tokens"],
                "rollout/episodes_total": self._counts["episodes"],
                "rollout/decisions_total": self._counts["decisions"],
                "rollout/scores_failed": self._counts["scores_failed"] + (scorer.num_failed if scorer else 0),
                "rollout/passes_total": self._engine.num_passes,
                "rollout/rows_active": self._engine.num_active,
                "rollout/idle_ratio": self._waiting_s / total_s,
                "rollout/policy_version": self._policy.version,
                "rollout/cache_bytes": self._engine.cache_nbytes,
                "weights/refused": self._counts["weights_refused"],
                "weights/publish_to_applied_s": self._publish_to_applied_s,
                **(scorer.metrics if scorer else {}),
            }

    def _wait_for_first_weights(self, should_stop: threading.Event) -> None:
        """Nothing is decoded by an agent nobody published. This wait is part of the start, and counted."""
        started = time.monotonic()
        while self._policy.version < 0 and not should_stop.wait(WEIGHTS_WAIT_S):
            self._take_newer_weights()
        with self._lock:
            self._waiting_s += time.monotonic() - started
            self._busy_s += time.monotonic() - started

    def _take_newer_weights(self) -> None:
        """Swap in newer weights, also in the middle of an episode; each decision names its version."""
        now = time.monotonic()
        if now - self._looked_for_weights_at < self._rollout.weights_poll_s and self._policy.version >= 0:
            return
        self._looked_for_weights_at = now
        try:
            newer = self._weights.fetch_newer(self._policy.version, skip=self._refused_version)
        except DamagedWeights as error:
            self._refuse_weights(error.version, error.why)
            return
        if newer is None:
            return
        if why := why_unfit(self._policy.agent, newer):
            if self._policy.version < 0:
                raise UserError(
                    f"agent: the published weights (version {newer.version}) do not fit this actor's agent "
                    f"({why}); use the same llm and agent settings for all actors and the learner"
                )
            self._refuse_weights(newer.version, f"they are of another agent ({why})")
            return
        # On the CPU the new tensors take the place of the old ones: nobody else writes to either.
        self._policy.agent.load_state_dict(newer.tensors, assign=self._llm.device.type == "cpu")
        self._policy.version = newer.version
        with self._lock:
            self._publish_to_applied_s = time.time() - newer.published_at_s

    def _refuse_weights(self, version: int, why: str) -> None:
        """Go on with the weights there are. The same version is not looked at again; others may follow."""
        self._refused_version = version
        with self._lock:
            self._counts["weights_refused"] += 1
            is_first = self._counts["weights_refused"] == 1
        if is_first:
            logger.warning(
                "weights of version %d are refused: %s; this actor goes on with version %d. Further ones are "
                "counted as weights/refused",
                version,
                why,
                self._policy.version,
            )

    def _hand_over(self, episodes: Sequence[Episode]) -> None:
        """Give episodes with all their scores to the sink, and count them."""
        self._sink.append(episodes)
        with self._lock:
            self._counts["episodes"] += len(episodes)
            self._counts["tokens"] += sum(episode.num_tokens for episode in episodes)
            self._counts["decisions"] += sum(episode.num_decisions for episode in episodes)

    def _score(self, generations: list[Generation]) -> list[Unscored]:
        """The answers, with the raw scores of each reward head; unscorable ones are counted.

        Raises:
            UserError: at least 64 answers could not be scored, and most: the learner would wait for ever, or
                learn from the few that are empty.
        """
        answers: list[Unscored] = []
        for generation in generations:
            prefix_scores = score_prefixes(self._heads, generation, self._llm.eos_ids)
            failed = [name for name, scores_N in prefix_scores.items() if not np.isfinite(scores_N).all()]
            if failed:
                with self._lock:
                    self._counts["scores_failed"] += 1
                logger.warning("dropped an episode: the scores of %s are not finite", ", ".join(failed))
                num_failed, num_scored = (
                    self._counts["scores_failed"],
                    self._counts["episodes"] + len(answers),
                )
                if num_failed >= MIN_FAILURES and num_failed > num_scored:
                    raise UserError(
                        f"rewards.{failed[0]}.path: no finite score for {num_failed} of the first "
                        f"{num_failed + num_scored} answers; fit the head again, or try llm.dtype=float32"
                    )
                continue
            prompt, number = generation.request.tag
            uid = f"{self.actor_id}-{self._seed:016x}-{number}"
            episode = to_episode(generation, uid, prompt.id, self.actor_id, prefix_scores)
            text = "" if self._scorer is None else self._llm.decode(generation.response_ids)
            answers.append(Unscored(episode, Conversation(prompt.prompt, text)))
        return answers


def render_prompts(
    llm: LLM, prompts: Sequence[Prompt], max_prompt_tokens: int, field: str = "rollout.max_prompt_tokens"
) -> dict[str, list[int]]:
    """Token ids of every prompt, templated, by the prompt's id.

    Args:
        field: the setting that gives the limit, for messages.

    Raises:
        UserError: a prompt is longer than ``max_prompt_tokens``.
    """
    rendered = {prompt.id: llm.render(prompt.prompt) for prompt in prompts}
    for name, ids in rendered.items():
        if len(ids) > max_prompt_tokens:
            raise UserError(
                f"prompts: {name} has {len(ids)} tokens with its template, {field} is "
                f"{max_prompt_tokens}; shorten the prompt or raise the limit"
            )
    return rendered


def score_prefixes(
    heads: Mapping[str, RewardHead], generation: Generation, eos_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """Raw scores of each head for the answer's first n tokens, float32 [N], the last of the whole answer.

    They come from the hidden states that decoding left behind. The end-of-sequence token is no part of the
    text: the answer with it scores as without it, an answer of nothing else as an empty one.
    """
    num_words = len(generation.response_ids) - (generation.response_ids[-1] in eos_ids)
    scores = {}
    for name, head in heads.items():
        if num_words == 0:
            scores[name] = head.score_states([torch.stack(generation.token_states)[:0]]).numpy()
            continue
        scores_N = head.score_prefixes(torch.stack(generation.token_states[:num_words])).numpy()
        scores[name] = np.append(scores_N, scores_N[num_words - 1 : len(generation.response_ids) - 1])
    return scores


def to_episode(
    generation: Generation, uid: str, prompt_id: str, actor_id: str, prefix_scores: dict[str, np.ndarray]
) -> Episode:
    """The record of a finished answer."""
    decisions = generation.decisions

    def column(pick: Callable[[Any], Any], dtype: Any) -> np.ndarray:
        return np.array([pick(decision) for decision in decisions], dtype=dtype)

    states = [decision.state_D for decision in decisions]
    hidden_size = generation.token_states[0].shape[-1]
    dtype = generation.token_states[0].dtype
    states_TD = torch.stack(states) if states else torch.empty(0, hidden_size, dtype=dtype)
    if states_TD.dtype not in (torch.bfloat16, torch.float16):
        states_TD = states_TD.to(torch.bfloat16)
    return Episode(
        uid=uid,
        prompt_id=prompt_id,
        actor_id=actor_id,
        prompt_ids_P=np.array(generation.request.prompt_ids, np.int32),
        response_ids_N=np.array(generation.response_ids, np.int32),
        states_TD=states_TD.cpu(),
        actions_T=column(lambda d: d.action, np.uint8),
        ranks_T=column(lambda d: d.rank, np.int16),
        num_candidates_T=column(lambda d: d.num_candidates, np.int16),
        positions_T=column(lambda d: d.position, np.int32),
        forced_T=column(lambda d: d.forced, bool),
        reference_logprobs_T=column(lambda d: d.reference_logprob, np.float32),
        accept_logprobs_T=column(lambda d: d.accept_logprob, np.float32),
        reject_logprobs_T=column(lambda d: d.reject_logprob, np.float32),
        policy_versions_T=column(lambda d: d.policy_version, np.int64),
        finish_reason=generation.finish_reason,
        started_at_s=generation.started_at_s,
        finished_at_s=generation.finished_at_s,
        scores={name: float(scores_N[-1]) for name, scores_N in prefix_scores.items()},
        prefix_scores=prefix_scores,
    )
