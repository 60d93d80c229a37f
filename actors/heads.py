"""Reward heads: small networks that score an answer from the frozen LLM's own hidden states.

A head costs no forward pass of its own during rollouts: the decoding engine has the states already. It is
fitted to preference pairs by Eq. 3 (:mod:`mara.actors.head_fit`) and stored as safetensors and JSON.

Legend: B answers, N tokens of one answer, M tokens of all of them, D hidden size, W units.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mara.actors.answer_states import read_answers
from mara.actors.head_config import HeadShape
from mara.actors.llm import LLM
from mara.common.contracts import Conversation
from mara.common.errors import UserError
from mara.common.files import replacing, write_whole

WEIGHTS_FILE = "head.safetensors"
CARD_FILE = "head.json"

WORST_TEMPERATURE = 2.0
MAX_EXPONENT = 15.0


class RewardHead(nn.Module):
    """Scores answers: 0 is the base LLM's average sampled answer, 1 is one standard deviation better.

    With h_n the state at token n, normalised to mean 0 and variance 1 over D::

        score = (raw - base_mean) / base_std
        raw   = preference · mean_n h_n + length_weight · ln N + sound_weight · ln σ(z)
        z     = mean_n v(h_n) + worst · softmin_n v(h_n) + bias

    The first term is the human preference. σ(z) is the probability that the text is not broken; v is a
    network of one hidden layer, applied to each token, and the soft minimum finds a broken spot in a good
    text. For a sound text ln σ(z) is about 0, so it does not disturb the preference; for a broken one it
    falls without limit.
    """

    base_mean: torch.Tensor
    base_std: torch.Tensor
    empty_score: torch.Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.preference_D = nn.Parameter(torch.zeros(shape.hidden_size))
        if shape.width:
            self.hidden = nn.Linear(shape.hidden_size, shape.width)
            self.output = nn.Linear(shape.width, 1)
            self.worst = nn.Parameter(torch.zeros(()))
            self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("base_mean", torch.zeros(()))
        self.register_buffer("base_std", torch.ones(()))
        self.register_buffer("empty_score", torch.zeros(()))

    def token_values(self, normal_MD: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """v(h), float32 [M]."""
        x = functional.dropout(normal_MD, dropout) if dropout else normal_MD
        x = functional.gelu(self.hidden(x))
        x = functional.dropout(x, dropout) if dropout else x
        values_M: torch.Tensor = self.output(x)[:, 0]
        return values_M

    def soundness(
        self, normal_MD: torch.Tensor, counts_B: torch.Tensor, dropout: float = 0.0
    ) -> torch.Tensor:
        """z, float32 [B], of answers of ``counts_B`` >= 1 tokens, whose states follow each other."""
        values_M1 = self.token_values(normal_MD, dropout)[:, None]
        mean_B = segment_mean(values_M1, counts_B)[:, 0]
        return (
            mean_B
            + functional.softplus(self.worst) * _softmin(segment_mean(_badness(values_M1), counts_B)[:, 0])
            + self.bias
        )

    def preference(self, normal_MD: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
        """preference · mean_n h_n, float32 [B]."""
        return segment_mean((normal_MD @ self.preference_D)[:, None], counts_B)[:, 0]

    def forward(self, states_MD: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B] of answers of ``counts_B`` >= 1 tokens, whose states follow each other."""
        normal_MD = normalise(states_MD)
        raw_B = self.preference(normal_MD, counts_B) + self.shape.length_weight * torch.log(counts_B.float())
        if self.shape.width:
            raw_B = raw_B + self.shape.sound_weight * functional.logsigmoid(
                self.soundness(normal_MD, counts_B)
            )
        return (raw_B - self.base_mean) / self.base_std

    @torch.no_grad()
    def score_states(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores float32 [B], on the CPU, from each answer's states.

        ``states[i]`` is [N_i, D], any float dtype: the LLM's last hidden states after its final norm at
        the answer's tokens, *without* an end-of-sequence token. An empty answer (N_i = 0) gets the lowest
        score seen in the fit.
        """
        scores_B = torch.full((len(states),), float(self.empty_score))
        filled = [i for i, states_ND in enumerate(states) if len(states_ND)]
        if filled:
            device = self.preference_D.device
            counts_B = torch.tensor([len(states[i]) for i in filled], device=device)
            states_MD = torch.cat([states[i].to(device) for i in filled])
            scores_B[filled] = self(states_MD, counts_B).float().cpu()
        return scores_B

    @torch.no_grad()
    def score_prefixes(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Scores float32 [N], on the CPU, of the answer's first n tokens, n = 1 … N, at the cost of one.

        The last one is :meth:`score_states` of the whole answer. ``states_ND`` as there.
        """
        normal_ND = normalise(states_ND.to(self.preference_D.device))
        counts_N = torch.arange(1, len(normal_ND) + 1, device=normal_ND.device)
        raw_N = (normal_ND @ self.preference_D).cumsum(
            0
        ) / counts_N + self.shape.length_weight * counts_N.log()
        if self.shape.width:
            values_N = self.token_values(normal_ND)
            worst_N = _softmin(_badness(values_N).cumsum(0) / counts_N)
            sound_N = values_N.cumsum(0) / counts_N + functional.softplus(self.worst) * worst_N + self.bias
            raw_N = raw_N + self.shape.sound_weight * functional.logsigmoid(sound_N)
        return ((raw_N - self.base_mean) / self.base_std).float().cpu()


def normalise(states_MD: torch.Tensor) -> torch.Tensor:
    """Each state to mean 0 and variance 1 over D, float32."""
    return functional.layer_norm(states_MD.float(), states_MD.shape[-1:])


def segment_mean(values_MF: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Mean [B, F] over each of B runs of ``counts_B`` rows."""
    owner_M = torch.repeat_interleave(torch.arange(len(counts_B), device=values_MF.device), counts_B)
    sums_BF = values_MF.new_zeros(len(counts_B), values_MF.shape[1]).index_add(0, owner_M, values_MF)
    return sums_BF / counts_B[:, None]


def _badness(values: torch.Tensor) -> torch.Tensor:
    """exp(-v / temperature), bounded so that sums stay finite."""
    return torch.exp((-values / WORST_TEMPERATURE).clamp(-MAX_EXPONENT, MAX_EXPONENT))


def _softmin(mean_badness: torch.Tensor) -> torch.Tensor:
    return -WORST_TEMPERATURE * torch.log(mean_badness)


class HeadRewardModel:
    """A reward head with its LLM, as a :class:`~mara.common.contracts.RewardModel`: reads the text itself."""

    def __init__(self, llm: LLM, head: RewardHead) -> None:
        self._llm, self._head = llm, head

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B]. One forward pass over each prompt and each answer."""
        groups = []
        for conversation in conversations:
            ids = answer_ids(self._llm, conversation.response)
            groups.append((self._llm.render(conversation.prompt), [ids] if ids else []))
        answers = read_answers(self._llm, groups)
        empty = torch.empty(0, self._llm.hidden_size)
        return self._head.score_states([group[0].states_ND if group else empty for group in answers])


def answer_ids(llm: LLM, text: str) -> list[int]:
    """Token ids of an answer's text, without special tokens."""
    return list(llm.tokenizer(text, add_special_tokens=False)["input_ids"])


def save_head(folder: Path, head: RewardHead, card: dict[str, Any]) -> None:
    """Write ``head.safetensors`` and ``head.json`` into ``folder``, which is made if missing.

    ``card`` is kept beside the head's shape. Each file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    with replacing(folder / WEIGHTS_FILE) as partial:
        save_file(tensors, partial)
    content = {"head": head.shape.model_dump(mode="json"), **card}
    write_whole(folder / CARD_FILE, json.dumps(content, indent=2) + "\n")


def read_head_shape(folder: Path, hidden_size: int | None = None) -> HeadShape:
    """The shape of the head in ``folder``, without loading its weights: a cheap check before a run.

    Raises:
        UserError: a file is missing or damaged, or the head belongs to an LLM of another hidden size.
    """
    for name in (WEIGHTS_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"reward head: {folder / name} is missing; give a folder that `mara reward fit` wrote"
            )
    try:
        card = _read_card(folder)
        shape = HeadShape.model_validate(card["head"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"reward head: {folder / CARD_FILE} cannot be read ({reason}); fit it again"
        ) from error
    if hidden_size is not None and shape.hidden_size != hidden_size:
        raise UserError(
            f"reward head: {folder} was fitted for hidden size {shape.hidden_size}, the LLM has "
            f"{hidden_size}; use the LLM it was fitted for ({card.get('llm', 'not recorded')}) or fit a head "
            "for this one"
        )
    return shape


def read_head_llm(folder: Path) -> str | None:
    """Name of the LLM that the head in ``folder``, which can be read, was fitted for. None: not recorded."""
    name = _read_card(folder).get("llm")
    return name if isinstance(name, str) else None


def head_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the head in ``folder``, by name: what tells a head wherever it is kept."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (CARD_FILE, WEIGHTS_FILE)
    }


def read_base_scores(folder: Path) -> dict[str, float]:
    """Mean score of the LLM's own answers in the fit of the head in ``folder``, which can be read.

    By how they were drawn: ``greedy``, ``sampled`` (which defines 0), … Empty where they are not recorded.
    """
    report = _read_card(folder).get("report")
    scores = report.get("base_scores") if isinstance(report, dict) else None
    if not isinstance(scores, dict):
        return {}
    return {
        drawn: float(score)
        for drawn, score in scores.items()
        if isinstance(score, int | float) and math.isfinite(score)
    }


def _read_card(folder: Path) -> Any:
    return json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))


def load_head(folder: Path, hidden_size: int | None = None) -> RewardHead:
    """The head saved in ``folder``, in evaluation mode, without gradients, on the CPU.

    Raises:
        UserError: a file is missing or damaged, a number in it is not finite, or the head belongs to an LLM
            of another hidden size.
    """
    shape = read_head_shape(folder, hidden_size)
    try:
        head = RewardHead(shape)
        head.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"reward head: {folder / WEIGHTS_FILE} cannot be read ({reason}); fit it again"
        ) from error
    for name, tensor in head.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"reward head: {folder / WEIGHTS_FILE}: {name} is not finite; fit it again")
    return head.eval().requires_grad_(False)
