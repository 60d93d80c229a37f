"""Reward heads: small networks that score an answer from the frozen LLM's own hidden states.

A head costs no forward pass of its own during rollouts: the decoding engine has the states already. It is
fitted to preference pairs by Eq. 3 (:mod:`mara.actors.head_fit`) and stored as safetensors and JSON.

Legend: B answers, N tokens of one answer, D hidden size, F features, M members, W units.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mara.actors.answer_states import read_answers
from mara.actors.head_config import HeadShape
from mara.actors.llm import LLM
from mara.common.contracts import Conversation, UserError

WEIGHTS_FILE = "head.safetensors"
CARD_FILE = "head.json"

Pool = Literal["mean", "deviation", "last"]
_POOLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda normal_ND: normal_ND.mean(0),
    "deviation": lambda normal_ND: normal_ND.std(0, correction=0),
    "last": lambda normal_ND: normal_ND[-1],
}


def pool_states(states_ND: torch.Tensor, pools: Sequence[str]) -> torch.Tensor:
    """Features float32 [F] of an answer, F = D · number of pools.

    Each token's state is normalised to mean 0 and variance 1 over D, then averaged over the tokens
    (``mean``), its spread over them taken (``deviation``), or the last one (``last``). N >= 1.
    """
    normal_ND = functional.layer_norm(states_ND.float(), states_ND.shape[-1:])
    return torch.cat([_POOLS[pool](normal_ND) for pool in pools])


class RewardHead(nn.Module):
    """Scores answers by pooled hidden states: 0 is the base LLM's average answer, 1 one deviation better.

    ``f(x) = mean_m f_m(x) - pessimism · std_m f_m(x)`` over M members, each linear or with one hidden
    layer, on standardised features x. Members fitted to different parts of the pairs disagree where none
    of them has data, and the second term then lowers the score.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        features, members, width = shape.hidden_size * len(shape.pools), shape.members, shape.width
        self.register_buffer("feature_mean_F", torch.zeros(features))
        self.register_buffer("feature_scale_F", torch.ones(features))
        self.register_buffer("base_mean", torch.zeros(()))
        self.register_buffer("base_std", torch.ones(()))
        self.register_buffer("empty_score", torch.zeros(()))
        if width:
            self.hidden_MFW = nn.Parameter(torch.randn(members, features, width) / features**0.5)
            self.hidden_bias_MW = nn.Parameter(torch.zeros(members, width))
        self.output_MW = nn.Parameter(torch.zeros(members, width or features))

    def raw_members(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Scores [M, B] of each member before standardising, from pooled features."""
        x_BF = (features_BF - self.feature_mean_F) / self.feature_scale_F
        if not self.shape.width:
            return self.output_MW @ x_BF.T
        hidden_MBW = functional.gelu(x_BF @ self.hidden_MFW + self.hidden_bias_MW[:, None])
        return torch.einsum("mbw,mw->mb", hidden_MBW, self.output_MW)

    def raw(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Scores [B] before standardising by the base LLM's answers."""
        scores_MB = self.raw_members(features_BF)
        if self.shape.members == 1:
            return scores_MB[0]
        return scores_MB.mean(0) - self.shape.pessimism * scores_MB.std(0, correction=0)

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B] from pooled features (:func:`pool_states`)."""
        return (self.raw(features_BF) - self.base_mean) / self.base_std

    @torch.no_grad()
    def score_states(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores float32 [B], on the CPU, from each answer's states.

        ``states[i]`` is [N_i, D], any float dtype: the LLM's last hidden states after its final norm at
        the answer's tokens, *without* an end-of-sequence token. An empty answer (N_i = 0) gets the lowest
        score seen in the fit.
        """
        device = self.feature_mean_F.device
        scores_B = torch.full((len(states),), float(self.empty_score))
        filled = [i for i, states_ND in enumerate(states) if len(states_ND)]
        if filled:
            features_BF = torch.stack([pool_states(states[i].to(device), self.shape.pools) for i in filled])
            scores_B[filled] = self(features_BF).float().cpu()
        return scores_B

    @torch.no_grad()
    def score_prefixes(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Scores float32 [N], on the CPU, of the answer's first n tokens, n = 1 … N.

        The last one is :meth:`score_states` of the whole answer. ``states_ND`` as there.
        """
        features_NF = pool_prefixes(states_ND.to(self.feature_mean_F.device), self.shape.pools)
        return self(features_NF).float().cpu()


def pool_prefixes(states_ND: torch.Tensor, pools: Sequence[str]) -> torch.Tensor:
    """:func:`pool_states` of the first n states for n = 1 … N: float32 [N, F], at the cost of one pass."""
    normal_ND = functional.layer_norm(states_ND.float(), states_ND.shape[-1:])
    count_N1 = torch.arange(1, len(normal_ND) + 1, device=normal_ND.device)[:, None]
    mean_ND = normal_ND.cumsum(0) / count_N1
    pooled = {"mean": mean_ND, "last": normal_ND}
    if "deviation" in pools:
        pooled["deviation"] = (normal_ND.square().cumsum(0) / count_N1 - mean_ND.square()).clamp(min=0).sqrt()
    return torch.cat([pooled[pool] for pool in pools], dim=-1)


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
    save_file(tensors, partial := folder / (WEIGHTS_FILE + ".partial"))
    partial.replace(folder / WEIGHTS_FILE)
    content = {"head": head.shape.model_dump(mode="json"), **card}
    partial = folder / (CARD_FILE + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CARD_FILE)


def read_head_shape(folder: Path, hidden_size: int | None = None) -> HeadShape:
    """The shape of the head in ``folder``, without loading its weights: a cheap check before a run.

    Raises:
        UserError: a file is missing or damaged, or the head belongs to an LLM of another hidden size.
    """
    for name in (WEIGHTS_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise UserError(f"reward head: {folder / name} is missing; give a folder that `mara reward fit` wrote")
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        shape = HeadShape.model_validate(card["head"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"reward head: {folder / CARD_FILE} cannot be read ({reason}); fit it again") from error
    if hidden_size is not None and shape.hidden_size != hidden_size:
        raise UserError(
            f"reward head: {folder} was fitted for hidden size {shape.hidden_size}, the LLM has {hidden_size}; "
            f"use the LLM it was fitted for ({card.get('llm', 'not recorded')}) or fit a head for this one"
        )
    return shape


def load_head(folder: Path, hidden_size: int | None = None) -> RewardHead:
    """The head saved in ``folder``, in evaluation mode, without gradients, on the CPU.

    Raises:
        UserError: a file is missing or damaged, or the head belongs to an LLM of another hidden size.
    """
    head = RewardHead(read_head_shape(folder, hidden_size))
    try:
        head.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"reward head: {folder / WEIGHTS_FILE} cannot be read ({reason}); fit it again") from error
    return head.eval().requires_grad_(False)
