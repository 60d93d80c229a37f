"""Going on with a run that ended before it was complete, in its folder and with its settings.

::

    RUN/config.yaml    the settings; the few that may change are taken over into it
    RUN/run.json       what names the run elsewhere, and how often it was started
    RUN/checkpoints/   where the learner goes on; without one it begins with the first episode of the log
    RUN/metrics.jsonl  is cut back to the checkpoint: what was done after it is done again
    RUN/replay.json    where its episodes are: the ring is filled from them
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from mara.common.addresses import HIDDEN
from mara.common.agent import CARD_FILE
from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config
from mara.deploy.preflight import Checked
from mara.deploy.run_folder import (
    CONFIG_FILE,
    LOGS,
    RUN_RECORD,
    RunRecord,
    load_run,
    make_run_folder,
    new_record,
    read_log_record,
    read_run_record,
    set_report_aside,
    write_settings,
)
from mara.deploy.run_lock import PREDECESSOR_S, hold_run, who_runs
from mara.deploy.store import check_unused
from mara.deploy.trust import called_by_run, check_trusted
from mara.learner.checkpoint import find_checkpoint
from mara.learner.saving import AGENT_FOLDER, CHECKPOINT_FOLDER

MAY_CHANGE = (
    "learner.num_episodes",
    "learner.data_timeout_s",
    "learner.publish_period_s",
    "learner.checkpoint_period_s",
    "learner.num_checkpoints",
    "learner.log_period_s",
    "learner.device",
    "learner.sac.cuda_graph",
    "learner.num_threads",
    "rollout.num_actors",
    "rollout.rows",
    "rollout.num_cpus",
    "rollout.num_gpus",
    "rollout.num_threads",
    "rollout.max_unscored",
    "replay.redis_url",
    "evaluation",
    "wandb.mode",
    "ray",
    "run.stop_timeout_s",
)
"""Settings that decide how far, how fast and where a run goes on, not what it learns."""


class Resumed(NamedTuple):
    """A run to go on with."""

    folder: Path
    config: RunConfig
    record: RunRecord
    """With this start counted."""
    checkpoint: Path | None
    """Where the learner goes on; None: none was saved yet, it begins with the first episode of the log."""
    gradient_step: int
    """Of the checkpoint."""
    num_episodes: int
    """Of the checkpoint."""


class Start(NamedTuple):
    """A run as this process starts it: for the first time, or to go on."""

    folder: Path
    record: RunRecord
    resumed: Resumed | None

    @property
    def checkpoint_name(self) -> str | None:
        """Of the checkpoint that the learner goes on from."""
        if self.resumed is None or self.resumed.checkpoint is None:
            return None
        return self.resumed.checkpoint.name

    @property
    def position(self) -> tuple[int, int] | None:
        """Gradient step and episodes that the run goes on from; None at its first start."""
        return None if self.resumed is None else (self.resumed.gradient_step, self.resumed.num_episodes)

    def actor_names(self, num_actors: int) -> list[str]:
        """A name for each rollout actor that none of an earlier start had: its random streams come from it.

        Example: ``actor-0`` at the first start, ``actor-0-start-2`` at the second.
        """
        mark = "" if self.record.num_starts == 1 else f"-start-{self.record.num_starts}"
        return [f"actor-{number}{mark}" for number in range(num_actors)]


@contextmanager
def take_run_folder(
    config: RunConfig,
    checked: Checked,
    resumed: Resumed | None,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Start]:
    """The folder in which a run starts, a new one or that of the run that goes on; held until the block ends.

    While a learner that outlived its run is waited for, ``pause`` waits for a number of seconds, and may
    raise to end the waiting.

    Raises:
        UserError: it cannot be written, another process uses it or its log, or the run is not what it was.
        OSError: it cannot be written any more.
    """
    with ExitStack() as exits:
        if resumed is None:
            folder = make_run_folder(config)
            record = new_record(folder)
            exits.enter_context(hold_run(folder))
            record.write(folder)
        else:
            folder, record = resumed.folder, resumed.record
            exits.enter_context(hold_run(folder))
            check_as_it_was(resumed, checked, pause)
            check_unused(config, folder, record.run_id)
            take_over(resumed)
        yield Start(folder, record, resumed)


def find_resumed(
    run: Path, overrides: Sequence[str], warn: Callable[[str], None], *, is_trusted: bool = False
) -> Resumed:
    """The run in the folder ``run``, with ``key=value`` overrides. Changes nothing; tells ``warn`` of damage.

    ``is_trusted``: what it names may be called, whoever began it.

    Raises:
        UserError: it is no run, is complete, is going on, or is somebody else's who is not trusted; a setting
            cannot change; a file is damaged.
    """
    check_may_change(overrides)
    before = load_run(run)
    config = load_run(run, overrides)
    folder = run.resolve()
    if (process := who_runs(folder)) is not None:
        raise UserError(f"{folder}: this run goes on still ({process}); wait for its end, or stop it first")
    for url in config.replay.redis_urls:
        if HIDDEN in url:
            raise UserError(
                f"{folder}: its episodes are on the server at {url}, whose password a run folder does not "
                "hold; add replay.redis_url with it"
            )
    record = read_run_record(folder)
    checkpoint = find_checkpoint(folder / CHECKPOINT_FOLDER, warn)
    if checkpoint is None and config.ray.address is not None:
        raise UserError(
            f"{folder} has no checkpoint on this machine; the machines of the cluster must share the run "
            "folder (run.dir) for that; start a new run"
        )
    gradient_step, num_episodes = (0, 0) if checkpoint is None else _position(checkpoint)
    _check_incomplete(folder, num_episodes, before, config)
    if record is None:
        raise UserError(f"{folder / RUN_RECORD} is missing or damaged; start a new run")
    check_trusted(folder / CONFIG_FILE, called_by_run(before), called_by_run(config), is_trusted=is_trusted)
    record = record._replace(num_starts=record.num_starts + 1)
    return Resumed(folder, config, record, checkpoint, gradient_step, num_episodes)


def check_may_change(overrides: Sequence[str]) -> None:
    """Refuse overrides that would make another run of it.

    Raises:
        UserError: one line for each; names the key alone.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    fixed = [key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)]
    if fixed:
        allowed = ", ".join(MAY_CHANGE)
        raise UserError(
            "\n".join(f"{key} stays as the run began; settings that may change: {allowed}" for key in fixed)
        )


def check_as_it_was(resumed: Resumed, checked: Checked, pause: Callable[[float], None] = time.sleep) -> None:
    """Refuse to go on where the run is not what it was when it began, or when :func:`find_resumed` saw it.

    The caller holds the run, so that nobody else changes it any more. A learner that outlived its run is
    waited for, with ``pause``. ``checked`` is how things are now.

    Raises:
        UserError: a reward head, the LLM or the prompts are others, or the run went on meanwhile.
    """
    folder = resumed.folder
    if (folder / LOGS).is_dir():
        with hold_run(folder / LOGS, PREDECESSOR_S, pause):
            pass
    record = read_run_record(folder)
    checkpoint = find_checkpoint(folder / CHECKPOINT_FOLDER, lambda _damage: None)
    if (
        record is None
        or record.num_starts + 1 != resumed.record.num_starts
        or checkpoint != resumed.checkpoint
    ):
        raise UserError(f"{folder}: this run went on meanwhile; give the command again")
    log = read_log_record(folder)
    if log is None:
        return
    if log.hidden_size != checked.hidden_size:
        raise UserError(
            f"llm.model={resumed.config.llm.model} has hidden size {checked.hidden_size}, had "
            f"{log.hidden_size} when the run began; put the old one back, or start a new run"
        )
    if log.llm_digest != checked.llm_digest:
        raise UserError(
            f"llm.model: the files of {resumed.config.llm.model} have changed since the run began "
            f"({log.llm_digest[:12]}…, now {checked.llm_digest[:12]}…), and its agent learns from the states "
            "of the old ones; put those back (of a Hub model: llm.revision=COMMIT), or start a new run"
        )
    for name, files in checked.reward_digests.items():
        if log.heads.get(name, files) != files:
            head = resumed.config.heads.get(name)
            what = f".path: the files of {head.path} have" if head else ": its module or its settings have"
            raise UserError(
                f"rewards.{name}{what} changed since the run began, and its episodes have the scores of the "
                "old ones; put those back, or start a new run"
            )
    if log.prompts_digest != checked.prompts_digest:
        raise UserError(
            f"prompts.train: {resumed.config.prompts.train} has changed since the run began; put the old "
            "prompts back, or start a new run"
        )


def take_over(resumed: Resumed) -> None:
    """Note in the run folder that the run goes on: its settings, one more start, no report of its agent."""
    set_report_aside(resumed.folder)
    write_settings(resumed.folder, dump_config(resumed.config))
    resumed.record.write(resumed.folder)


def where_it_goes_on(resumed: Resumed) -> str:
    """What is said of it at the start."""
    if resumed.checkpoint is None or resumed.gradient_step == resumed.num_episodes == 0:
        return "the run had learnt nothing yet: training begins at the beginning"
    return (
        f"the run goes on from {resumed.checkpoint.name}: {resumed.num_episodes} of "
        f"{resumed.config.learner.num_episodes} episodes, {resumed.gradient_step} gradient steps"
    )


def _check_incomplete(folder: Path, num_episodes: int, before: RunConfig, config: RunConfig) -> None:
    """Refuse a run that has nothing left to do.

    Raises:
        UserError: it has not, or is asked for fewer episodes than it had.
    """
    wanted = config.learner.num_episodes
    try:
        card = json.loads((folder / AGENT_FOLDER / CARD_FILE).read_text())
        # The agent is saved before the checkpoint: only where both were, all was.
        is_complete = bool(card["training"]["complete"]) and card["training"]["episodes"] == num_episodes
    except (OSError, ValueError, KeyError, TypeError):
        is_complete = False
    log_has_ended = before.replay.from_run is not None and num_episodes < before.learner.num_episodes
    complete = f"{folder}: this run is complete ({num_episodes} episodes)"
    if is_complete and log_has_ended:
        raise UserError(complete)
    if wanted < num_episodes:
        raise UserError(
            f"learner.num_episodes={wanted}: the run has read {num_episodes} already; give a higher number"
        )
    if is_complete and wanted == num_episodes:
        raise UserError(f"{complete}; to train it longer, add learner.num_episodes with a higher number")


def _position(checkpoint: Path) -> tuple[int, int]:
    """Gradient steps and episodes of a checkpoint, as its name has them."""
    match = re.fullmatch(r"step-(\d+)-episode-(\d+)", checkpoint.name)
    assert match is not None, "find_checkpoint gives only such"
    return int(match[1]), int(match[2])
