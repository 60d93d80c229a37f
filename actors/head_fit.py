"""Fitting a reward head to preference pairs (Eq. 3) and to broken texts, and measuring it.

Two parts, fitted one after the other because the first saturates on sound texts and then leaves the
second alone: the probability that a text is sound, by logistic regression of a token network; and the human
preference, by the pairwise log-loss with the first part as a fixed offset.

Legend: T texts, B texts of a batch, C comparisons, D hidden size, M tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from mara.actors.config import LLMConfig
from mara.actors.head_card import card_of, write_card
from mara.actors.head_config import FitConfig, FitReport, HeadShape
from mara.actors.head_material import (
    BROKEN_TEXT,
    MILD_SALAD,
    OWN,
    OWN_TEXT,
    PREFERENCE,
    REAL,
    SALAD,
    SAMPLED,
    SPLIT_SEED,
    Material,
    OwnAnswers,
    Progress,
    build_material,
    check_prompts,
    render_conversation,
    sample_own_answers,
)
from mara.actors.head_measure import (
    PREFIXES,
    comparison_table,
    in_share,
    measure,
    score_texts,
    texts_of,
)
from mara.actors.heads import RewardHead, normalise, save_head, segment_mean
from mara.actors.llm import LLM, load_llm
from mara.actors.preferences import (
    PreferencePair,
    drop_shared_answers,
    prompt_fraction,
    read_preferences,
)
from mara.actors.prompts import load_prompts
from mara.common.errors import UserError
from mara.common.seeding import derive_seed, generator

BATCH_TEXTS = 160
DROPOUT = 0.1
MIN_PAIRS = 20
MIN_OWN_ANSWERS = 10
SHRINKAGE = 0.05
"""Share of the identity in the covariance by which the preference is penalised."""
SIZE_PENALTY = 1e-3
"""On the square of the size that is fitted after the direction."""


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head and how good it is."""

    head: RewardHead
    report: FitReport


def fit_from_files(llm_config: LLMConfig, config: FitConfig, out: Path, progress: Progress) -> FitReport:
    """Read pairs and prompts, load the LLM, fit a head, write it and its card into ``out``.

    ``progress`` gets (what is being done, done, in all). Files are read and their rows counted before the LLM
    is loaded.

    Raises:
        UserError: pairs, prompts or LLM cannot be read, or there are too few pairs or prompts.
    """
    pairs = read_preferences(config.pairs, config.pairs_split)
    check_pairs(drop_shared_answers(pairs), config)
    if config.prompts is None:
        prompts = [pair.messages[-1].content for pair in pairs]
    else:
        prompts = [prompt.prompt for prompt in load_prompts(config.prompts, "--prompts")]
    check_prompts(len(set(prompts)), config)
    llm = load_llm(llm_config)
    fitted = fit_reward_head(llm, pairs, prompts, config, progress)
    save_head(out, fitted.head, card_of(config, fitted.report))
    write_card(out, llm_config, config, fitted.report)
    return fitted.report


def fit_reward_head(
    llm: LLM,
    pairs: Sequence[PreferencePair],
    prompts: Sequence[str],
    config: FitConfig,
    progress: Progress,
    own: Sequence[OwnAnswers] | None = None,
) -> FittedHead:
    """Fit a head for ``llm``. ``own`` are its answers to the prompts if they have been sampled before.

    Raises:
        UserError: too few pairs or prompts are short enough, or the LLM has nothing to say to them.
    """
    started_s = time.monotonic()
    clean = drop_shared_answers(pairs)
    limit = config.max_prompt_tokens
    check_pairs([pair for pair in clean if render_conversation(llm, pair.messages, limit)], config)
    if own is None:
        own = sample_own_answers(llm, prompts, config, progress)
    num_sampled = sum(item.answers[SAMPLED].ids[0] not in llm.eos_ids for item in own)
    if num_sampled < MIN_OWN_ANSWERS:
        raise UserError(
            f"prompts: of the LLM's own answers to {len(own)} prompts {num_sampled} say anything, and the "
            f"scale of a head takes {MIN_OWN_ANSWERS}; give more or other prompts"
        )
    material = build_material(llm, clean, own, config, progress)
    head = fit_material(material, config, llm.hidden_size, progress)
    report = measure(head, material, config).model_copy(
        update={
            "llm": llm.name,
            "num_pairs": len(pairs),
            "num_shared_answers": len(pairs) - len(clean),
            "seconds": round(time.monotonic() - started_s, 1),
        }
    )
    return FittedHead(head, report)


def check_pairs(pairs: Sequence[PreferencePair], config: FitConfig) -> None:
    """Refuse pairs that are too few to fit to or to measure with, at no cost.

    Raises:
        UserError: fewer than 20 in the part that is fitted to, or none in the part that is held out.
    """
    usable = [pair for pair in pairs if pair.chosen and pair.rejected and pair.chosen != pair.rejected]
    places_T = torch.tensor([prompt_fraction(pair.group, SPLIT_SEED) for pair in usable], dtype=torch.float64)
    num_pairs = int(in_share(places_T, config).sum())
    if num_pairs < MIN_PAIRS:
        raise UserError(_too_few(config, num_pairs))
    if not (places_T < config.held_out).any():
        raise UserError(
            f"pairs: no pair of {config.pairs} falls into the held-out part; give more pairs, or raise "
            f"held_out={config.held_out}"
        )


def _too_few(config: FitConfig, num_pairs: int) -> str:
    return (
        f"pairs: {config.pairs} leaves {num_pairs} pairs to fit to; give at least {MIN_PAIRS} with two "
        f"different answers and a prompt of at most max_prompt_tokens={config.max_prompt_tokens}"
    )


def fit_material(material: Material, config: FitConfig, hidden_size: int, progress: Progress) -> RewardHead:
    """Fit a head to the part ``config.share`` of the prompts that are not held out.

    Raises:
        UserError: fewer than 20 pairs in that part.
    """
    used_T = in_share(material.places_T, config)
    num_pairs = sum(c.kind == PREFERENCE and bool(used_T[c.better]) for c in material.comparisons)
    if num_pairs < MIN_PAIRS:
        raise UserError(_too_few(config, num_pairs))
    torch.manual_seed(derive_seed(config.seed, "head"))
    shape = HeadShape(
        hidden_size=hidden_size,
        width=config.width,
        sound_weight=config.sound_weight,
        length_weight=config.length_weight,
    )
    head = RewardHead(shape)
    _fit_soundness(head, material, used_T, config, progress)
    progress("fitting the preference", 0, 1)
    _fit_preference(head, material, used_T, config)
    _standardise(head, material)
    progress("fitting the preference", 1, 1)
    return head.eval().requires_grad_(False)


def _fit_soundness(
    head: RewardHead, material: Material, used_T: torch.Tensor, config: FitConfig, progress: Progress
) -> None:
    """Logistic regression: real against broken, each kind equally often, at random lengths."""
    weights_T, real_T = _soundness_weights(material, used_T)
    draws = generator(config.seed, "soundness batches")
    parameters = [*head.hidden.parameters(), *head.output.parameters(), head.worst, head.bias]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=config.steps + 1)
    shortest = min(12, config.max_answer_tokens)
    for step in range(config.steps):
        texts_B = torch.multinomial(weights_T, BATCH_TEXTS, replacement=True, generator=draws)
        limits_B = torch.randint(shortest, config.max_answer_tokens + 1, (BATCH_TEXTS,), generator=draws)
        states_MD, counts_B = material.take(texts_B, limits_B)
        z_B = head.soundness(normalise(states_MD), counts_B, DROPOUT)
        # Not quite 0 and 1: certainty would let z grow without end.
        loss = functional.binary_cross_entropy_with_logits(z_B, real_T[texts_B] * 0.98 + 0.01)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == config.steps:
            progress("fitting the soundness", step + 1, config.steps)


def _soundness_weights(material: Material, used_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each text is drawn, and 1.0 for real texts: both float [T]."""
    shares = {PREFERENCE: 3.0, OWN_TEXT: 0.5, **dict.fromkeys(OWN, 1.0)}
    shares |= dict.fromkeys((*SALAD, *BROKEN_TEXT), 1.0) | dict.fromkeys(MILD_SALAD, 0.5) | {"repeated": 2.0}
    weights_T = torch.zeros(len(material.kinds_T))
    for kind, share in shares.items():
        of_kind_T = torch.tensor([k == kind for k in material.kinds_T]) & used_T
        weights_T[of_kind_T] = share / max(1, int(of_kind_T.sum()))
    return weights_T, torch.tensor([float(kind in REAL) for kind in material.kinds_T])


def _fit_preference(head: RewardHead, material: Material, used_T: torch.Tensor, config: FitConfig) -> None:
    """Eq. 3 in closed concave form: ridge-penalised pairwise log-loss, the other terms held fixed.

    With ``penalty="noise"`` the ridge is on the variance of the preference from token to token within an
    answer. What an answer is shows in its mean over tokens, of which that variance is the noise; and an
    agent, which chooses tokens, could raise the score along such directions without another answer in
    substance.
    """
    table = comparison_table(material, used_T, config)
    means_RD, offsets_R = _means_and_offsets(head, material, *table.texts_and_limits)
    better_C, worse_C = torch.tensor(table.better), torch.tensor(table.worse)
    weights_C = _preference_weights(table.kinds, config)
    kept = weights_C > 0
    better_C, worse_C, weights_C = better_C[kept], worse_C[kept], weights_C[kept] / weights_C.sum()
    differences_CD = means_RD[better_C] - means_RD[worse_C]
    offsets_C = offsets_R[better_C] - offsets_R[worse_C]
    if config.penalty == "features":
        scale_D = means_RD.std(0).clamp(min=1e-4) * math.sqrt(means_RD.shape[1])
    else:
        whitening_DD = _token_whitening(material, used_T)
        differences_CD = differences_CD @ whitening_DD
        scale_D = differences_CD.square().sum(1).mean().sqrt().clamp(min=1e-6)
    differences_CD = differences_CD / scale_D
    direction_D = _minimise(
        lambda w: _log_loss(differences_CD @ w + offsets_C, weights_C) + config.ridge_used * w.square().sum(),
        torch.zeros(means_RD.shape[1]),
    )
    if config.penalty == "noise":
        # That penalty is there for the direction: left to itself it would shrink the preference, too.
        along_C = differences_CD @ direction_D
        spread = along_C.square().mean().sqrt().clamp(min=1e-9)
        factor = _minimise(
            # Pairs that a line divides would have no end of it.
            lambda f: (
                _log_loss(f * along_C / spread + offsets_C, weights_C) + SIZE_PENALTY * f.square().sum()
            ),
            torch.zeros(1),
        )
        direction_D = whitening_DD @ (direction_D * (factor / spread))
    with torch.no_grad():
        head.preference_D.copy_(direction_D / scale_D)


def _log_loss(margins_C: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    return (functional.softplus(-margins_C) * weights_C).sum()


def _minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """Where a smooth convex loss of one tensor is least."""
    value = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([value], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        found = loss(value)
        torch.autograd.backward(found)
        return found

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return value.detach()


def _token_whitening(material: Material, used_T: torch.Tensor) -> torch.Tensor:
    """Inverse square root [D, D] of the covariance of tokens' states around the mean of their answer.

    Taken over the LLM's own answers, shrunk a little towards the identity, with a mean variance of 1.
    """
    texts_T = (used_T & torch.tensor([kind in OWN for kind in material.kinds_T])).nonzero()[:, 0]
    size = material.states_MD.shape[1]
    covariance_DD = torch.zeros(size, size, dtype=torch.float64)
    for texts_B in torch.split(texts_T, 256):
        states_MD, counts_B = material.take(texts_B, material.counts_T[texts_B])
        normal_MD = normalise(states_MD)
        means_BD = segment_mean(normal_MD, counts_B)
        deviations_MD = normal_MD - torch.repeat_interleave(means_BD, counts_B, dim=0)
        covariance_DD += (deviations_MD.T @ deviations_MD).double()
    identity_DD = torch.eye(size, dtype=torch.float64)
    covariance_DD *= size / covariance_DD.trace().clamp(min=1e-6)
    values_D, vectors_DD = torch.linalg.eigh((1 - SHRINKAGE) * covariance_DD + SHRINKAGE * identity_DD)
    whitening_DD: torch.Tensor = (vectors_DD / values_D.sqrt()) @ vectors_DD.T
    return whitening_DD.float()


def _preference_weights(kinds: Sequence[str], config: FitConfig) -> torch.Tensor:
    """Weight of each comparison: those of one kind share the kind's weight.

    With ``penalty="noise"`` broken texts count more, as the preference would otherwise go towards slips, and
    its size would raise them.
    """
    cut, broken = (1.0, 1.0) if config.penalty == "features" else (3.0, 5.0)
    totals = {PREFERENCE: 1.0, **{f"{PREFERENCE} {limit}": 0.5 for limit in PREFIXES}}
    totals |= {"cut to a half": 0.15 * cut, "cut to a quarter": 0.15 * cut, "two tokens": 0.05 * cut}
    totals |= dict.fromkeys(SALAD, 0.06 * broken) | dict.fromkeys(BROKEN_TEXT, 0.025 * broken)
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    return torch.tensor([totals.get(kind, 0.0) / counts[kind] for kind in kinds])


@torch.no_grad()
def _means_and_offsets(
    head: RewardHead, material: Material, texts_R: torch.Tensor, limits_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean normalised state [R, D], and the terms of the score that do not depend on the preference [R]."""
    means, offsets = [], []
    for part in torch.split(torch.arange(len(texts_R)), 512):
        states_MD, counts_B = material.take(texts_R[part], limits_R[part])
        normal_MD = normalise(states_MD)
        means.append(segment_mean(normal_MD, counts_B))
        sound_B = functional.logsigmoid(head.soundness(normal_MD, counts_B))
        offsets.append(head.shape.sound_weight * sound_B + head.shape.length_weight * counts_B.log())
    return torch.cat(means), torch.cat(offsets)


def _standardise(head: RewardHead, material: Material) -> None:
    """Mean 0 and deviation 1 over the LLM's own sampled answers."""
    texts_R = texts_of(material, SAMPLED)
    everything_R = torch.arange(len(material.kinds_T))
    whole = int(material.counts_T.max())
    scores_R = score_texts(head, material, texts_R, torch.full_like(texts_R, whole))
    mean, std = scores_R.mean(), scores_R.std().clamp(min=1e-6)
    lowest = score_texts(head, material, everything_R, torch.full_like(everything_R, whole)).min()
    head.base_mean.copy_(mean)
    head.base_std.copy_(std)
    head.empty_score.copy_((lowest - mean) / std)
