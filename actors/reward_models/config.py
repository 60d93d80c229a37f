"""Settings of reward models that are not heads on the frozen LLM. Imports no torch."""

from __future__ import annotations

import re
import string
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mara.common.config import LONGEST_S, Config

PLACES = {"prompt", "response"}
"""What a template may name in braces."""


class RewardModelConfig(Config):
    """What every reward model has that runs in processes of its own."""

    weight: float
    """What one unit of its score counts in the reward (Eq. 13). Negative for a cost. Usual range -2–2."""
    batch_size: int = Field(default=16, ge=1)
    """Conversations scored at the same time by one process. Usual range 8–64."""
    timeout_s: float = Field(default=60.0, gt=0, le=LONGEST_S)
    """Longest wait for scores, seconds, of up to 64 answers from each rollout actor at the same time. A later
    score is a failed one: its episode is dropped and counted (``rollout/scores_failed``). Usual range 10–300.
    """
    max_outage_s: float = Field(default=300.0, gt=0, le=LONGEST_S)
    """How long it may give no score at all before the run is given up, seconds. Usual range 60–3600."""
    replicas: int = Field(default=1, ge=1)
    """Processes with a copy of the model each; the answers of an actor are spread over them. Usual range
    1–4."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores Ray reserves for one replica. Usual range 0.1–4."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or a fraction of one, that Ray reserves for one replica. Usual range 0–1."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of one replica's arithmetic on the CPU."""


class CheckpointConfig(RewardModelConfig):
    """A reward model whose weights transformers reads. Code that comes with a model is never run."""

    model: str = Field(min_length=1)
    """A Hugging Face model name or a folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. None: its default branch."""
    device: str = "auto"
    """``auto`` takes a GPU if the process has one, for which it needs ``num_gpus``; else ``cpu`` or ``cuda``.
    """
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights. ``auto`` takes 16 bit where the device multiplies it itself."""
    max_length: int = Field(default=2048, ge=1)
    """Longest prompt and answer together with the template, tokens. A model that reads fewer positions bounds
    it further. Usual range 512–4096."""
    too_long: Literal["refuse", "truncate"] = "refuse"
    """What is done with longer ones. ``refuse``: the score fails and the episode is dropped. ``truncate``:
    the answer's end is left out, as much as is needed; what the template puts after it stays."""


class BeaverRewardConfig(CheckpointConfig):
    """A Llama body with ``score_head``: PKU-Alignment/beaver-7b-v1.0-reward and -cost (Safe RLHF)."""

    kind: Literal["beaver"] = "beaver"
    add_eos: bool = True
    """Put the end-of-sequence token behind the answer, as the models' own training and evaluation do."""


class UltraRMRewardConfig(CheckpointConfig):
    """A Llama body with ``regression_head``: openbmb/UltraRM-13b."""

    kind: Literal["ultrarm"] = "ultrarm"
    add_eos: bool = False
    """Put the end-of-sequence token behind the answer."""


class SequenceClassifierRewardConfig(CheckpointConfig):
    """Any sequence classifier of transformers. The score is its logit; no function is applied to it."""

    kind: Literal["sequence_classifier"] = "sequence_classifier"
    template: str = "chat"
    """How a conversation becomes text. ``chat``: the chat template of the model's tokenizer (Skywork,
    FsfairX). ``pair``: prompt and answer as a pair of sentences (OpenAssistant's DeBERTa). Else a text with
    ``{prompt}`` and ``{response}``."""
    add_bos: bool | None = None
    """Whether the text begins with the tokenizer's begin-of-sequence token, once. None: as the chat template
    has it or, without one, as the tokenizer does by itself."""
    add_eos: bool = False
    """Put the end-of-sequence token behind the text, where it does not end with it."""
    label: int | None = Field(default=None, ge=0)
    """Which of several logits is the score, from 0. None: the model has one."""

    @model_validator(mode="after")
    def _usable(self) -> SequenceClassifierRewardConfig:
        if self.template not in ("chat", "pair"):
            check_template(self.template)
        if self.template == "pair" and (self.add_bos is not None or self.add_eos):
            raise ValueError("add_bos and add_eos do not go with template=pair; leave them out")
        return self


class FunctionRewardConfig(RewardModelConfig):
    """A Python function of yours: ``(prompts: list[str], responses: list[str])`` → one number for each."""

    kind: Literal["function"] = "function"
    function: str
    """``MODULE:FUNCTION``: an installed module, or a file in the folder that mara is started in, without its
    ``.py``. It is called with two short answers before a run starts."""

    @field_validator("function")
    @classmethod
    def _module_and_function(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
            raise ValueError(f"{name!r} is no MODULE:FUNCTION such as my_rewards:score; give one")
        return name


class HttpRewardConfig(RewardModelConfig):
    """A server that scores: one of yours, or a common serving engine."""

    kind: Literal["http"] = "http"
    url: str
    """Where conversations are posted, such as ``http://host:8000/score``. Holds no password."""
    protocol: Literal["mara", "vllm_score", "classify"] = "mara"
    """What is sent and comes back, as JSON. ``mara``: ``{"conversations": [{"prompt", "response"}, …]}`` →
    ``{"scores": [number, …]}``. ``vllm_score``: the ``/score`` of vLLM, prompt and answer as ``text_1`` and
    ``text_2``. ``classify``: the ``/classify`` of vLLM and SGLang, with ``template``."""
    model: str | None = None
    """Name of the model at the server, for ``vllm_score`` and ``classify``. None: not sent."""
    template: str = "{prompt}\n\n{response}"
    """Text that ``classify`` sends for a conversation, with ``{prompt}`` and ``{response}``."""
    label: int | None = Field(default=None, ge=0)
    """Which entry of ``probs`` is the score with ``classify``, from 0. None: there is one."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a batch is posted while the server is away or busy, all within ``timeout_s``. Usual range
    1–5."""
    retry_first_s: float = Field(default=0.5, gt=0, le=LONGEST_S)
    """Pause before the second attempt, seconds; it doubles at each further one."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """Name of the environment variable with the key that is sent as ``Authorization: Bearer``. On a cluster
    each machine needs it. None: nothing is sent."""

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("url is not the address of a server; give http://HOST:PORT/PATH")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "url must have no user, password or options; name the environment variable with the key in "
                "api_key_env"
            )
        return url

    @field_validator("template")
    @classmethod
    def _usable_template(cls, template: str) -> str:
        check_template(template)
        return template


def check_template(template: str) -> None:
    """A format string with ``{prompt}`` and ``{response}``, and nothing else in braces.

    Raises:
        ValueError: it is not.
    """
    remedy = "use {prompt} and {response}, each at least once, and double all other braces"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template[:60]!r} is malformed ({error}); {remedy}") from error
    named = {name for _, name, _, _ in parts if name is not None}
    if named != PLACES or any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(f"template {template[:60]!r} is not usable; {remedy}")
