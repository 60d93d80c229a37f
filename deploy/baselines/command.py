"""``mara baseline``: settings from the command line, checks, training, and what is left in the folder."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from mara.actors.config import LLMConfig
from mara.common.errors import UserError
from mara.common.extras import install_extra
from mara.deploy.baselines.card import RECORD, compute_lines, flops_text, read_report, write_cards
from mara.deploy.baselines.config import (
    AlignerSettings,
    BaselineConfig,
    BaselineReport,
    Compute,
    Data,
    DPOSettings,
    Method,
    PairsConfig,
    RLHFSettings,
)
from mara.deploy.config_file import find_config, make_settings, read_content
from mara.deploy.console import say
from mara.deploy.signals import StopSignal

NEEDED = ("trl", "peft", "datasets")
"""Packages of the extra ``baselines``."""
VERSIONS = ("mara-rl", "trl", "peft", "transformers", "torch")
SETTINGS: dict[Method, type[BaselineConfig]] = {
    "dpo": DPOSettings,
    "rlhf": RLHFSettings,
    "aligner": AlignerSettings,
}
SAY_EVERY_S = 10.0
SHOWN = ("loss", "rewards/accuracies", "reward", "kl", "mean_token_accuracy")
"""What is shown of the trainer's measurements while it goes on."""


class _Outcome(NamedTuple):
    """What one kind of training gives."""

    model: Any
    num_steps: int
    seconds: float
    last: dict[str, float]
    data: Data
    compute: Callable[[Any], Compute]
    """From the sizes of LLM and adapter."""
    dtype: Any
    """The LLM's, a ``torch.dtype``."""
    revision: str | None
    """Commit of the LLM, if it is one of the Hub."""


def baseline_settings(
    method: Method,
    llm: str | None,
    pairs: Sequence[str],
    prompts: Path | None,
    overrides: Sequence[str],
) -> BaselineConfig:
    """Settings of a baseline. Those of ``rlhf`` begin as the quickstart's: prompts, rewards, answers.

    Raises:
        UserError: one line for each mistake.
    """
    quickstart = read_content(find_config("quickstart"))
    content: dict[str, Any] = {"llm": quickstart["llm"] if llm is None else {"model": llm}}
    if method == "rlhf":
        content |= {
            "prompts": quickstart["prompts"]["train"] if prompts is None else str(prompts),
            "rewards": quickstart["rewards"],
            "max_new_tokens": quickstart["decoding"]["max_new_tokens"],
            "num_answers": quickstart["learner"]["num_episodes"],
        }
    else:
        content["pairs"] = list(pairs)
    return make_settings(SETTINGS[method], content, overrides, folder=Path.cwd())


def train_baseline(config: BaselineConfig, out: Path) -> None:
    """Train, and write adapter and cards into the new folder ``out``.

    Raises:
        UserError: the extra is not installed, data, heads or LLM cannot be read, or ``out`` has something in
            it.
        KeyboardInterrupt: a signal came. Nothing is kept.
    """
    from mara.deploy.preflight import check_out

    check_installed()
    check_out(out)
    work = _rlhf if isinstance(config, RLHFSettings) else _on_pairs
    with StopSignal() as stop:
        stop.interrupt_from_here()
        outcome = work(config)  # type: ignore[arg-type]
        _save(config, outcome, out)


def check_installed() -> None:
    """The packages of the extra are there.

    Raises:
        UserError: one is not.
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError(
            f"mara baseline needs the packages {', '.join(NEEDED[:-1])} and {NEEDED[-1]}; "
            + install_extra("baselines")
        )
    # Where bitsandbytes is installed peft imports it, and it warns of kernels that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def take_one_gpu(config: LLMConfig) -> LLMConfig:
    """Make the GPU of ``config`` the only one that this process sees: TRL refuses to work with several.

    To be called before CUDA starts. ``CUDA_VISIBLE_DEVICES`` counts as everywhere: ``cuda:1`` is the second
    of those it names.

    Returns:
        Settings under which the one GPU is that of ``config``; for other devices ``config``.

    Raises:
        UserError: there is no GPU of that number.
    """
    import torch

    kind, _, number = config.device.partition(":")
    if config.device not in ("auto", "cuda") and not (kind == "cuda" and number.isdecimal()):
        return config
    index, setting = int(number or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = str(index)
    if setting is not None:
        # CUDA itself passes over what follows a device that is none.
        visible = list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, setting.split(","))))
        chosen = visible[index] if index < len(visible) else ""
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    if not number:
        return config
    if torch.cuda.device_count() == 0:
        raise UserError(
            f"llm.device={config.device}: there is no such GPU here; use auto, cpu, cuda or cuda:N"
        )
    return config.model_copy(update={"device": "cuda"})


def _check_steps(num_pairs: int, config: PairsConfig) -> None:
    if math.ceil(num_pairs / config.batch_size) * config.num_epochs == 1:
        raise UserError(
            f"{num_pairs} pairs to train on make a single step of batch_size={config.batch_size}, and its "
            "learning rate is 0; give more pairs, a larger share, a smaller batch_size or more num_epochs"
        )


def _on_pairs(config: PairsConfig) -> _Outcome:
    from mara.actors.llm import load_llm
    from mara.deploy.baselines.compute import count_logits, pairs_compute
    from mara.deploy.baselines.material import aligner_pairs, dpo_pairs, read_pairs
    from mara.deploy.model_shape import check_llm_template, find_identity

    check_llm_template(config.llm)
    read = read_pairs(config)
    _check_steps(len(read.pairs[: config.num_pairs]), config)
    say(f"{config.method}: loading {config.llm.model}")
    llm = load_llm(take_one_gpu(config.llm), pack=False)
    revision = find_identity(config.llm).commit
    if isinstance(config, AlignerSettings):
        pairs, data = aligner_pairs(llm, read, config)
    else:
        pairs, data = dpo_pairs(llm, read, config)
    _say_data(config, data)
    _check_steps(len(pairs), config)  # Some of them were too long, or no pairs.
    from mara.deploy.baselines.training import train_aligner, train_dpo

    # Both answers are read by DPO, and the better one alone by the corrector, whose prompt has the other.
    answers = [
        (pair.prompt_ids, ids)
        for pair in pairs
        for ids in ((pair.chosen_ids, pair.rejected_ids) if config.method == "dpo" else (pair.chosen_ids,))
    ]
    num_answer_tokens = sum(len(ids) for _, ids in answers) * config.num_epochs
    num_tokens = sum(len(prompt_ids) for prompt_ids, _ in answers) * config.num_epochs + num_answer_tokens
    num_logits = count_logits(llm.device, num_tokens, num_answer_tokens, len(answers) * config.num_epochs)
    if isinstance(config, DPOSettings):
        trained = train_dpo(llm, pairs, config, _Lines(config.method).tell)
    else:
        assert isinstance(config, AlignerSettings)
        trained = train_aligner(llm, pairs, config, _Lines(config.method).tell)
    has_reference = config.method == "dpo"
    return _Outcome(
        *trained,
        data,
        lambda size: pairs_compute(size, num_tokens, num_logits, has_reference),
        llm.dtype,
        revision,
    )


def _rlhf(config: RLHFSettings) -> _Outcome:
    from mara.actors.llm import load_llm
    from mara.actors.rollout import render_prompts
    from mara.deploy.baselines.compute import count_logits, rlhf_compute
    from mara.deploy.config import portable_name
    from mara.deploy.hub import digest_of, load_source
    from mara.deploy.model_shape import check_llm_template, find_hidden_size, find_identity
    from mara.deploy.preflight import check_head, warn_of_head

    prompts = load_source(config.prompts, "prompts")
    hidden_size = find_hidden_size(config.llm)
    check_llm_template(config.llm)
    heads = {name: check_head(name, reward.path, hidden_size) for name, reward in config.rewards.items()}
    for name, reward in config.rewards.items():
        warn_of_head(name, reward.path, config.llm.model)
    say(f"rlhf: loading {config.llm.model}")
    llm_config = take_one_gpu(config.llm)
    reader = load_llm(llm_config)
    revision = find_identity(config.llm).commit
    render_prompts(reader, prompts, config.max_prompt_tokens, "max_prompt_tokens")
    data = Data(
        sources={portable_name(config.prompts): digest_of(config.prompts, prompts)},
        num_read=len(prompts),
        num_used=config.num_answers,
    )
    _say_data(config, data)
    from mara.deploy.baselines.training import train_rlhf

    for head in heads.values():
        head.to(reader.device)
    llm = load_llm(llm_config, pack=False)
    trained, tokens = train_rlhf(llm, reader, prompts, heads, config, _Lines("rlhf").tell)
    num_logits = count_logits(llm.device, tokens.prompts + tokens.answers, tokens.answers, config.num_answers)
    return _Outcome(
        *trained,
        data,
        lambda size: rlhf_compute(size, *tokens, num_logits=num_logits, has_reference=config.kl_weight > 0),
        llm.dtype,
        revision,
    )


def _save(config: BaselineConfig, outcome: _Outcome, out: Path) -> None:
    """Make ``out``, which appears whole or not at all."""
    from mara.deploy.baselines.compute import size_of

    model = outcome.model
    trained = [p for p in model.parameters() if p.requires_grad]
    if not all(p.isfinite().all() for p in trained):
        raise UserError(
            f"learning_rate={config.learning_rate:g}: the adapter is not finite after {outcome.num_steps} "
            "steps; lower it, or use llm.dtype=float32"
        )
    if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
        raise UserError(
            f"the adapter is as it began after {outcome.num_steps} steps: nothing told one answer from "
            "another; look at the pairs or the rewards, and at learning_rate"
        )
    num_trained = sum(p.numel() for p in trained)
    size = size_of(model)
    report = BaselineReport(
        method=config.method,
        revision=outcome.revision,
        dtype=str(outcome.dtype).removeprefix("torch."),
        data=outcome.data,
        num_steps=outcome.num_steps,
        num_trained=num_trained,
        seconds=round(outcome.seconds, 1),
        last=outcome.last,
        compute=outcome.compute(size._replace(body=size.body - num_trained, adapter=num_trained)),
        versions={name: version(name) for name in VERSIONS},
    )
    # The folder in which the LLM happens to be unpacked means nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = config.llm.model
    final = out.resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial, save_embedding_layers=False)
        write_cards(partial, config, report)
        partial.rename(final)  # fails where somebody else has put something there
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{config.method}: {report.seconds:.0f} s, {flops_text(report.compute.total)}; saved: {out}")


def _say_data(config: BaselineConfig, data: Data) -> None:
    left_out = "".join(f", {count} left out ({why})" for why, count in data.left_out.items())
    unit = "answers" if config.method == "rlhf" else "pairs"
    say(f"{config.method}: {data.num_used} {unit} to train on; {data.num_read} read{left_out}")


class _Lines:
    """A line at the first and the last step, and every ten seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said_s = float("-inf")

    def tell(self, done: int, total: int, measured: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < SAY_EVERY_S and done < total:
            return
        self._said_s = now_s
        parts = [f"{name} {measured[name]:.4g}" for name in SHOWN if name in measured]
        parts += [f"{name} {value:+.3f}" for name, value in measured.items() if name.startswith("score/")]
        say(" | ".join([f"  {self._what}: step {done}/{total}", *parts]))


def print_compute(folders: Sequence[Path]) -> None:
    """Say what the trainings in ``folders`` took: of baselines by their cards, of runs by their metrics.

    Raises:
        UserError: a folder is neither.
    """
    for folder in folders:
        compute = read_report(folder).compute if (folder / RECORD).is_file() else run_compute(folder)
        say(f"{folder}: {flops_text(compute.total)}\n{compute_lines(compute)}")


def run_compute(folder: Path) -> Compute:
    """What the training of an agent took, by the settings and the last metrics of its run.

    Raises:
        UserError: it is no run, or it has no rollouts of its own.
    """
    from mara.actors.llm import load_llm
    from mara.actors.rollout import render_prompts
    from mara.common.agent import Agent
    from mara.common.critic import TwinCritic
    from mara.deploy.baselines.compute import agent_compute, size_of
    from mara.deploy.hub import load_source
    from mara.deploy.plots import read_metrics
    from mara.deploy.recorder import METRICS_FILE
    from mara.deploy.run_folder import load_run

    config = load_run(folder)
    try:
        records = read_metrics(folder / METRICS_FILE)
    except OSError as error:
        raise UserError(
            f"{folder}: {METRICS_FILE} cannot be read ({error.strerror}); give a run that has trained"
        ) from error
    names = ("episodes/total", "tokens/total", "learner/gradient_step")
    last = {name: _last(records, name) for name in names}
    rollouts = {name: _last(records, f"rollout/{name}_total") for name in ("decisions", "tokens")}
    if not all(last.values()) or not all(rollouts.values()):
        raise UserError(
            f"{folder} has no rollouts and steps of its own; give a run that sampled its episodes"
        )
    # Its sizes and its tokens count: the weights are not read, nor is a GPU needed.
    plain = config.llm.model_copy(update={"device": "cpu", "quantization": "none"})
    llm = load_llm(plain, pack=False, weights=False)
    prompts = load_source(config.prompts.train, "prompts.train")
    lengths = [len(ids) for ids in render_prompts(llm, prompts, config.rollout.max_prompt_tokens).values()]
    num_read = last["episodes/total"] / config.rollout.answers_per_prompt
    networks = (
        Agent(llm.hidden_size, config.agent),
        TwinCritic(llm.hidden_size, config.learner.sac.critic_widths),
    )
    return agent_compute(
        size_of(llm.model),
        num_prompt_tokens=round(num_read * sum(lengths) / len(lengths)),
        # The counts of rollout actors begin anew where a run was resumed; the learner's do not.
        num_decisions=round(last["tokens/total"] * rollouts["decisions"] / rollouts["tokens"]),
        num_answer_tokens=round(last["tokens/total"]),
        num_transitions=round(last["learner/gradient_step"] * config.learner.batch_size),
        num_agent_parameters=sum(p.numel() for p in networks[0].parameters()),
        num_critic_parameters=sum(p.numel() for p in networks[1].parameters()),
    )


def _last(records: Sequence[Mapping[str, float | None]], name: str) -> float:
    """The last value of a metric; 0 where it has none."""
    return next((value for record in reversed(records) if (value := record.get(name))), 0.0)
