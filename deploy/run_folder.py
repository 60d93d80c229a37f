"""The folder of one run: made at its start, found again by ``mara eval`` and ``mara generate``."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mara.common.agent import CARD_FILE, WEIGHTS_FILE
from mara.common.errors import UserError
from mara.common.files import flush_to_disk, write_whole
from mara.deploy.config import AgentUse, RunConfig
from mara.deploy.config_file import dump_config, load_config, make_settings, read_content
from mara.deploy.trust import called_by_rewards, check_trusted, sign
from mara.learner.saving import AGENT_FOLDER, CHECKPOINT_FOLDER

CONFIG_FILE = "config.yaml"
LOGS = "logs"
LATEST = "latest"
REPLAY = "replay"
"""Where the run's own server keeps its append-only file, with ``replay.durable``."""
RUN_RECORD = "run.json"
REPORT_FILE = "report.json"
"""What the evaluation of the run's agent found."""
LOG_RECORD = "replay.json"
"""Where the run's episodes are, for a run that trains from them later."""


def make_run_folder(config: RunConfig, now_s: float | None = None) -> Path:
    """Make ``DIR/NAME-YYYYmmdd-HHMMSS`` with the resolved configuration.

    Raises:
        UserError: it cannot be written there.
    """
    assert config.run.name is not None, "load_config gives a name"
    return make_folder(config.run.dir, config.run.name, dump_config(config), "run.dir", now_s)


def make_folder(parent: Path, name: str, settings: str, field: str, now_s: float | None = None) -> Path:
    """Make ``PARENT/NAME-YYYYmmdd-HHMMSS`` with ``settings`` in it.

    Args:
        field: the setting that says where, for messages.

    Raises:
        UserError: it cannot be written there.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now_s))
    try:
        folder = make_unused(parent / f"{name}-{stamp}")
        fill_folder(folder, settings)
    except OSError as error:
        raise UserError(f"{field}={parent}: {error.strerror or error}; choose another") from error
    return folder


def fill_folder(folder: Path, settings: str) -> None:
    """Put into the new ``folder`` what every run has.

    Raises:
        OSError: it cannot be written.
    """
    (folder / LOGS).mkdir()
    write_settings(folder, settings)
    flush_to_disk(folder.parent)


def write_settings(folder: Path, settings: str) -> None:
    """Write the settings of a run or a comparison, signed as this user's.

    Raises:
        OSError: they cannot be written.
    """
    write_whole(folder / CONFIG_FILE, settings)
    sign(folder / CONFIG_FILE)


def set_report_aside(folder: Path) -> Path | None:
    """Give the report in ``folder`` the name of its time, as another agent or other prompts come next.

    Returns that name; None where there is no report.

    Raises:
        OSError: it cannot be renamed.
    """
    path = folder / REPORT_FILE
    if not path.exists():
        return None
    made = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    return path.rename(path.with_name(f"{path.stem}-{made}{path.suffix}"))


def make_unused(wanted: Path) -> Path:
    """Make the folder ``wanted``, or one with a number after it where another run took that second."""
    number, folder = 1, wanted
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not wanted.parent.is_dir():
                raise
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")


def name_latest(folder: Path) -> bool:
    """Point ``latest`` beside ``folder`` to it, if the policy in it has moved. Whether it has.

    ``latest`` is what the next command is given: until a run has an agent worth using, and where it never
    gets that far, the run before keeps the name.

    Raises:
        OSError: the link cannot be written.
    """
    card = folder / AGENT_FOLDER / CARD_FILE
    if not card.is_file() or not json.loads(card.read_text()).get("training", {}).get("policy_steps"):
        return False
    link = folder.with_name(f".{LATEST}.{folder.name}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.with_name(LATEST))
    return True


def settled(folder: Path) -> Path:
    """What ``folder`` names now: a link such as ``latest`` may move while a command goes on."""
    return folder.parent / folder.readlink() if folder.is_symlink() else folder


class RunRecord(NamedTuple):
    """What names a run elsewhere."""

    run_id: str
    """Its keys in the store are named by it."""
    wandb_id: str
    """Of its W&B run."""
    num_starts: int
    """How often it was started, this time included. Names the actors: no two starts repeat an episode."""

    def write(self, folder: Path) -> None:
        """Keep the record in a run folder."""
        write_whole(folder / RUN_RECORD, json.dumps(self._asdict(), indent=1) + "\n")


def new_record(folder: Path) -> RunRecord:
    """The record of a run that is started for the first time."""
    return RunRecord(f"{folder.name}-{secrets.token_hex(4)}", secrets.token_hex(4), 1)


def is_id_of(run_id: str, folder_name: str) -> bool:
    """Whether a run whose folder was made with this name may have the id, as :func:`new_record` gives it."""
    return re.fullmatch(re.escape(folder_name) + "-[0-9a-f]{8}", run_id) is not None


def read_run_record(folder: Path) -> RunRecord | None:
    """The record in a run folder; None if there is none that can be read."""
    try:
        return RunRecord(**json.loads((folder / RUN_RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class LogRecord(NamedTuple):
    """What a later run has to know of a run's replay log to train from it. Holds no password."""

    run_id: str
    """What its keys in the store are named by."""
    redis_urls: list[str] | None
    """Addresses of its shards with the passwords hidden; None where the run had a server of its own."""
    hidden_size: int
    """Of the LLM whose states it holds."""
    llm_digest: str
    """What tells that LLM from others: :func:`~mara.deploy.model_shape.find_digest`."""
    heads: dict[str, dict[str, str]]
    """Reward head, or other reward model, whose scores it holds → file, or what else → SHA-256."""
    prompts_digest: str
    """SHA-256 of the file of prompts that it answers, or of the prompts that the Hub gave."""

    def write(self, folder: Path) -> None:
        """Keep the record in a run folder."""
        write_whole(folder / LOG_RECORD, json.dumps(self._asdict(), indent=1) + "\n")


def read_log_record(folder: Path) -> LogRecord | None:
    """The record in a run folder; None if there is none that can be read."""
    try:
        return LogRecord(**json.loads((folder / LOG_RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def what_is_saved(folder: Path) -> str:
    """What a run that ends in an error has left in ``folder``, in a few words."""
    if (checkpoints := folder / CHECKPOINT_FOLDER).is_dir():
        return f"its last checkpoint is in {checkpoints}: `mara train --resume {folder}` goes on from there"
    if (agent := folder / AGENT_FOLDER).is_dir():
        return f"its agent is in {agent}"
    return "it had not saved a checkpoint here"


def agent_folder(folder: Path) -> Path:
    """Where the agent is: in a run, or in ``folder`` itself if that is an exported agent."""
    return folder if _is_exported(folder) else folder / AGENT_FOLDER


def _is_exported(folder: Path) -> bool:
    return (folder / CARD_FILE).is_file() and not (folder / CONFIG_FILE).is_file()


def check_agent(folder: Path) -> None:
    """The run in ``folder`` has saved an agent, or it is one.

    Raises:
        UserError: it has not: it goes on still, or ended before.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give the folder of a run or of an exported agent")
    if not agent_folder(folder).is_dir():
        raise UserError(
            f"{folder.resolve()} has no agent: its run has not saved one yet, or ended before it could; "
            "give the folder of another run"
        )


def load_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of the run in ``folder``, with ``key=value`` overrides.

    Raises:
        UserError: it is not there or no run folder, or a setting has ``${``: what a run saves is resolved.
    """
    if folder.name == LATEST and not folder.exists():
        raise UserError(
            f"{folder} is not there: no run in {folder.absolute().parent} has saved a trained agent yet; "
            "give the folder of a run, or train one first"
        )
    if not folder.exists():
        example = f", such as {known}" if (known := Path("runs") / LATEST).exists() else ""
        raise UserError(
            f"{folder} does not exist; give the folder of a run, which `mara train` makes{example}"
        )
    if _is_exported(folder):
        raise UserError(f"{folder} is an exported agent, not a run; give the folder of a run")
    if (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} has the weights of an agent without its card ({CARD_FILE}), which says what LLM it is "
            "for; get all the files of the export"
        )
    if not (folder / CONFIG_FILE).is_file():
        inner = f" in it, such as {latest}" if (latest := folder / LATEST).exists() else ""
        raise UserError(
            f"{folder} is not a run folder (no {CONFIG_FILE}); give one that `mara train` made{inner}"
        )
    check_resolved(folder / CONFIG_FILE, read_content(folder / CONFIG_FILE))
    return load_config(folder / CONFIG_FILE, overrides)


def load_use(folder: Path, overrides: Sequence[str] = ()) -> AgentUse:
    """How to use the agent in ``folder``: the settings of its run, or what the card of an exported one says.

    Raises:
        UserError: it is neither, or an override or the card is wrong: one line for each mistake.
    """
    if not _is_exported(folder):
        return load_run(folder, overrides)
    path = folder / CARD_FILE
    try:
        content = _use_on_card(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"agent: {path} cannot be read ({error}); fetch it again") from error
    check_resolved(path, content)
    return make_settings(AgentUse, content, overrides, folder)


def check_called(folder: Path, config: AgentUse, *, is_trusted: bool) -> None:
    """Refuse to compare by functions and servers that a run of somebody else names.

    Args:
        folder: of the run, or of an exported agent, which names none that would be called.
        config: what :func:`load_use` gave, with the settings that the user has changed.
        is_trusted: the user has given ``--trust``.

    Raises:
        UserError: they would be called.
    """
    if not _is_exported(folder):
        named, called = called_by_rewards(load_run(folder)), called_by_rewards(config)
        check_trusted(folder / CONFIG_FILE, named, called, is_trusted=is_trusted)


def check_resolved(path: Path, content: Any) -> None:
    """Refuse settings that name variables of the environment, as a configuration to start with may.

    In a file from somebody else they would hand a secret over: as part of the name of a model that is then
    asked for, say. Functions and servers that a run folder names: :func:`check_called`.

    Raises:
        UserError: there is one.
    """
    # Of what was read: in the file itself a character may be written in other ways.
    if any("${" in text for text in _texts(content)):
        raise UserError(f"{path} has ${{…}} in a setting, which a saved one has not; write the value there")


def _texts(content: Any) -> Iterator[str]:
    """Every key and value that is text."""
    match content:
        case str():
            yield content
        case dict():
            for key, value in content.items():
                yield str(key)
                yield from _texts(value)
        case list():
            for value in content:
                yield from _texts(value)


def _use_on_card(card: dict[str, Any]) -> dict[str, Any]:
    """The settings that a card has. The device is of another machine; heads are looked for in the folder.

    Other reward models are left out: a card from somebody else must not say what is called or loaded.
    """
    return {
        "llm": {name: value for name, value in card["llm"].items() if name != "device"},
        "decoding": card["decoding"],
        "rollout": card["rollout"],
        "rewards": {
            name: {"path": head["head"], "weight": head["weight"]}
            for name, head in card["rewards"].items()
            if "head" in head
        },
        "run": {"seed": card.get("seed", 0)},
    }
