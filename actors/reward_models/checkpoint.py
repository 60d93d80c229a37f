"""Reward models whose weights transformers reads.

Legend: B conversations, L tokens of the longest, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from mara.actors.config import LLMConfig
from mara.actors.llm import locate_model, resolve_device, resolve_dtype
from mara.actors.reward_models.config import (
    BeaverRewardConfig,
    CheckpointConfig,
    SequenceClassifierRewardConfig,
    UltraRMRewardConfig,
)
from mara.actors.reward_models.encoding import Encode, Encoded, PairEncoder, TextEncoder, pad, shorten
from mara.common.contracts import Conversation
from mara.common.errors import UserError

logger = logging.getLogger(__name__)

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
ULTRARM_TEMPLATE = "Human: {prompt}\n\nAssistant: {response}"
EPSILON = 1e-8
BIAS_SETTINGS = ("score_bias", "bias")
"""What later and earlier checkpoints of Safe RLHF call the setting that the score head has a bias."""

NORMALISATIONS = ("affine", "scale", "translate", "identity")
NORMALISATION_OF = {"reward": "affine", "cost": "scale", "critic": "identity"}
"""What the ``score_type`` of a Safe RLHF checkpoint means for its scores: the sign of a cost stays."""

Logits = Callable[[Sequence[Encoded]], torch.Tensor]
"""Raw scores, float [B], of conversations of about the same length."""


class CheckpointRewardModel:
    """Scores conversations in batches of like length; see :class:`~mara.common.contracts.RewardModel`."""

    def __init__(self, encode: Encode, logits: Logits, config: CheckpointConfig, max_length: int) -> None:
        self._encode, self._logits, self._config = encode, logits, config
        self._max_length = max_length
        self._has_told = False

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B] on the CPU, NaN for a conversation that is refused as too long."""
        rows = [self._fitting(conversation) for conversation in conversations]
        scores_B = torch.full((len(rows),), torch.nan)
        by_length = sorted(
            ((len(row.ids), index, row) for index, row in enumerate(rows) if row is not None), reverse=True
        )
        for start in range(0, len(by_length), self._config.batch_size):
            batch = by_length[start : start + self._config.batch_size]
            logits_B = self._logits([row for _, _, row in batch])
            scores_B[[index for _, index, _ in batch]] = logits_B.float().cpu()
        return scores_B

    def _fitting(self, conversation: Conversation) -> Encoded | None:
        encoded = self._encode(conversation)
        num_tokens = len(encoded.ids)
        if 0 < num_tokens <= self._max_length:
            return encoded
        if self._config.too_long == "truncate" and num_tokens:
            shortened = shorten(self._encode, conversation, self._max_length)
            if shortened is not None:
                return shortened
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "%s: a conversation of %d tokens is not scored, max_length is %d (too_long=%s); further ones "
                "are not told of",
                self._config.model,
                num_tokens,
                self._max_length,
                self._config.too_long,
            )
        return None


class Normaliser(torch.nn.Module):
    """Running mean and variance of the scores that the training of a Safe RLHF checkpoint saw.

    ``affine`` subtracts the mean and divides by the deviation, ``scale`` and ``translate`` do one of the two.
    """

    mean: torch.Tensor
    var: torch.Tensor

    def __init__(self, function: str) -> None:
        super().__init__()
        self._function = function
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))

    def forward(self, scores_B: torch.Tensor) -> torch.Tensor:
        if self._function in ("affine", "translate"):
            scores_B = scores_B - self.mean.float()
        if self._function in ("affine", "scale"):
            scores_B = scores_B / (self.var.float().sqrt() + EPSILON)
        return scores_B


class ScalarHeadModel(LlamaPreTrainedModel):  # type: ignore[misc]
    """A Llama body with a linear layer that turns the last token's state into a score."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)

    @property
    def head(self) -> torch.nn.Linear:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B]. Padding, where ``attention_mask`` [B, L] is 0, may be on either side."""
        positions_BL = (attention_mask.cumsum(1) - 1).clamp(min=0)
        states_BLD = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions_BL, use_cache=False
        ).last_hidden_state
        steps_L = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last_B = (attention_mask * steps_L).argmax(1)
        states_BD = states_BLD[torch.arange(len(last_B), device=last_B.device), last_B].float()
        bias = None if self.head.bias is None else self.head.bias.float()
        return torch.nn.functional.linear(states_BD, self.head.weight.float(), bias)[:, 0]


class BeaverModel(ScalarHeadModel):
    """Layout of PKU-Alignment/beaver-7b-v1.0-reward and -cost."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score_head = torch.nn.Linear(config.hidden_size, 1)
        self.normalizer = Normaliser(normalisation(config) or "identity")
        self.post_init()

    @property
    def head(self) -> torch.nn.Linear:
        return self.score_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        scores_B = super().forward(input_ids, attention_mask)
        normalised_B: torch.Tensor = self.normalizer(scores_B)
        return normalised_B


def normalisation(config: Any) -> str | None:
    """What the settings of a Safe RLHF checkpoint say is done to its scores, one of :data:`NORMALISATIONS`.

    None: they say something else, or two things.
    """
    if not getattr(config, "do_normalize", False):
        return "identity"
    kind, named = getattr(config, "score_type", None), getattr(config, "normalize_function", None)
    meant = {name for name in (named, NORMALISATION_OF.get(str(kind), kind)) if name is not None} or {
        "affine"
    }
    return meant.pop() if len(meant) == 1 and meant <= set(NORMALISATIONS) else None


class UltraRMModel(ScalarHeadModel):
    """Layout of openbmb/UltraRM-13b."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.regression_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @property
    def head(self) -> torch.nn.Linear:
        return self.regression_head


def load_beaver(config: BeaverRewardConfig) -> CheckpointRewardModel:
    """The model of a Safe RLHF checkpoint.

    Raises:
        UserError: it cannot be read, or is of another layout.
    """
    tokenizer, model, missing = _load(BeaverModel, config)
    if "score_head.bias" in missing:
        if any(getattr(model.config, name, False) for name in BIAS_SETTINGS):
            raise _unfit(config, "its config.json says that the score head has a bias, its weights have none")
        model.score_head.register_parameter("bias", None)
        missing.discard("score_head.bias")
    match normalisation(model.config):
        case None:
            says = {name: getattr(model.config, name, None) for name in ("score_type", "normalize_function")}
            raise _unfit(
                config,
                f"its config.json asks for scores to be normalised in a way that is not known ({says})",
                f"; of {', '.join(NORMALISATIONS)} give one in normalize_function",
            )
        case "identity":
            missing -= {"normalizer.mean", "normalizer.var"}
    _refuse_missing(config, missing)
    return _scalar_model(TextEncoder(tokenizer, BEAVER_TEMPLATE, True, config.add_eos), model, config)


def load_ultrarm(config: UltraRMRewardConfig) -> CheckpointRewardModel:
    """The model of an UltraRM checkpoint.

    Raises:
        UserError: it cannot be read, or is of another layout.
    """
    tokenizer, model, missing = _load(UltraRMModel, config)
    _refuse_missing(config, missing)
    return _scalar_model(TextEncoder(tokenizer, ULTRARM_TEMPLATE, True, config.add_eos), model, config)


def load_sequence_classifier(config: SequenceClassifierRewardConfig) -> CheckpointRewardModel:
    """Any model that ``AutoModelForSequenceClassification`` reads.

    Raises:
        UserError: it cannot be read, has no trained classifier, no such label or no chat template.
    """
    tokenizer, model, missing = _load(AutoModelForSequenceClassification, config)
    _refuse_missing(config, missing)
    label = which_label(config, model.config)
    encode: Encode
    if config.template == "pair":
        encode = PairEncoder(tokenizer)
    else:
        check_chat_template(config, tokenizer)
        encode = TextEncoder(tokenizer, config.template, config.add_bos, config.add_eos)
    text_config = model.config.get_text_config()
    own_pad_id = text_config.pad_token_id

    def logits(rows: Sequence[Encoded]) -> torch.Tensor:
        pad_id = own_pad_id
        if pad_id is None:
            # Decoders look for the last token that is not padding: any token that no row has will do.
            pad_id = _unused_id(rows)
            text_config.pad_token_id = pad_id
        logits_BK: torch.Tensor = model(**pad(rows, pad_id, model.device)).logits
        return logits_BK[:, label]

    return CheckpointRewardModel(encode, logits, config, _longest(config, model))


def which_label(config: SequenceClassifierRewardConfig, model_config: Any) -> int:
    """Index of the logit that is the score.

    Raises:
        UserError: the model has several and none is named, or not so many.
    """
    num_labels = int(model_config.num_labels)
    if config.label is None and num_labels > 1:
        raise _unfit(config, f"it has {num_labels} labels; set label to the one that is the score", "")
    label = config.label or 0
    if label >= num_labels:
        raise _unfit(config, f"label={label}, it has {num_labels} labels; count from 0", "")
    return label


def check_chat_template(config: SequenceClassifierRewardConfig, tokenizer: Any) -> None:
    """The tokenizer has a chat template, if that is what ``config`` asks for.

    Raises:
        UserError: it has none.
    """
    if config.template == "chat" and tokenizer.chat_template is None:
        raise _unfit(
            config, "its tokenizer has no chat template; set template to pair or a text with {prompt}", ""
        )


def _scalar_model(encode: Encode, model: Any, config: CheckpointConfig) -> CheckpointRewardModel:
    def logits(rows: Sequence[Encoded]) -> torch.Tensor:
        scores_B: torch.Tensor = model(**pad(rows, 0, model.device))
        return scores_B

    return CheckpointRewardModel(encode, logits, config, _longest(config, model))


def _load(model_class: Any, config: CheckpointConfig) -> tuple[Any, Any, set[str]]:
    """Tokenizer, model, and the weights of it that the checkpoint does not have."""
    device = resolve_device(config.device, "device")
    dtype = resolve_dtype(config.dtype, device)
    name, _ = locate_model(LLMConfig(model=config.model, revision=config.revision), "")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options: dict[str, Any] = {"trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, found = model_class.from_pretrained(
            name, dtype=dtype, weights_only=True, output_loading_info=True, **options
        )
    except Exception as error:
        # Damaged weights, settings and tokenizers each fail with an error of the library that reads them.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model: {config.model!r} cannot be loaded: {reason}") from error
    return tokenizer, model.to(device).eval().requires_grad_(False), set(found["missing_keys"])


def _refuse_missing(config: CheckpointConfig, missing: set[str]) -> None:
    """Weights that a checkpoint lacks were made up at random."""
    if missing:
        names = sorted(missing)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise _unfit(config, f"its weights have no {shown}")


def _unfit(
    config: CheckpointConfig, why: str, remedy: str = "; give a model of that layout, or another kind"
) -> UserError:
    return UserError(
        f"model: {config.model!r} is no {getattr(config, 'kind', 'model')} to score with: {why}{remedy}"
    )


def _longest(config: CheckpointConfig, model: Any) -> int:
    """``max_length``, or the model's own bound if that is lower."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(own, int) or own <= 0:
        return config.max_length
    # RoBERTa and its kin count positions from behind the padding's.
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return min(config.max_length, own if padding is None else own - padding - 1)


def _unused_id(rows: Sequence[Encoded]) -> int:
    used = {token for row in rows for token in row.ids}
    return next(token for token in range(len(used) + 1) if token not in used)
