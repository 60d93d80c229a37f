"""Training on the episodes of a finished run: whether they fit, and where they are.

::

    RUN/config.yaml    its LLM, candidates and rewards: what its episodes were made with
    RUN/replay.json    what its keys are named by, and the server that has them
    RUN/replay/        or the append-only file of a server of its own, of which a copy is opened
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.lease import holders
from mara.buffer.runs import log_length
from mara.buffer.shards import open_reader
from mara.common.addresses import HIDDEN
from mara.common.errors import ReplayUnavailable, UserError
from mara.deploy.config import RunConfig
from mara.deploy.console import shown, warn
from mara.deploy.model_shape import is_same_llm
from mara.deploy.plots import read_metrics
from mara.deploy.recorder import EPISODES, METRICS_FILE
from mara.deploy.run_folder import CONFIG_FILE, REPLAY, load_run, read_log_record
from mara.deploy.run_lock import who_runs
from mara.deploy.trust import NOT_OWN, OPTION, is_own

MADE_WITH = (
    "llm.gguf_file",
    "llm.revision",
    "llm.quantization",
    "llm.system_prompt",
    "llm.chat_template",
    "llm.doubled_bos",
    "decoding.truncation.top_k",
    "decoding.truncation.top_p",
    "decoding.truncation.temperature",
    "decoding.fallback",
)
"""Settings that decide what an episode holds, beside ``llm.model`` and the names of the rewards."""
MUCH_FORCED = 0.25
"""Share of forced tokens above which a run's episodes, or its agent, are warned of."""
FORCED_SHARE = "eval/forced_share"
"""Figure of an evaluation: the share of the tokens that the agent decided of which all candidates but one
were rejected."""


@dataclass(frozen=True, slots=True)
class FinishedLog:
    """The replay log of a finished run."""

    run_folder: Path
    run_id: str
    heads: dict[str, dict[str, str]]
    """Reward head, or other reward model, that scored the episodes → file, or what else → SHA-256."""
    redis_urls: list[str] | None
    """The servers of its shards; None where it is in ``data_dir``."""
    data_dir: Path | None
    """Folder with the append-only file of the server that had it."""
    max_bytes: int
    """Memory that server was given."""
    num_episodes: int | None = None
    """Those that it has; None where that shows only once a server has read ``data_dir``."""


def find_log(config: RunConfig, hidden_size: int, llm_digest: str) -> FinishedLog:
    """The log that ``replay.from`` names, if its episodes fit the settings.

    ``hidden_size`` and ``llm_digest`` are those of the LLM as it is now.

    Raises:
        UserError: that is no run, its episodes do not fit, or they are not there any more.
    """
    folder = config.replay.from_run
    assert folder is not None
    field = f"replay.from={folder}"
    try:
        run = load_run(folder)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    if run.replay.from_run is not None:  # It trained on the episodes of another: those are meant.
        folder = run.replay.from_run
        field = f"{field} (episodes of {folder})"
        try:
            run = load_run(folder)
        except UserError as error:
            raise UserError(f"{field}: {error}") from error
    if (process := who_runs(folder)) is not None:
        raise UserError(f"{field}: {_goes_on(process)}")
    for difference in _differences(config, run):
        raise UserError(
            f"{field}: its episodes were made with {difference}; use the same, or make new ones with "
            "rollout actors"
        )
    record = read_log_record(folder)
    if record is None:
        raise UserError(f"{field}: nothing says where its episodes are (no replay.json); give another run")
    if record.hidden_size != hidden_size:
        raise UserError(
            f"{field}: its LLM has hidden size {record.hidden_size}, llm.model={config.llm.model} has "
            f"{hidden_size}; use the LLM that its episodes were made with"
        )
    if record.llm_digest != llm_digest:
        raise UserError(
            f"{field}: its episodes were made with other files of llm.model={config.llm.model} "
            f"({record.llm_digest[:12]}…, now {llm_digest[:12]}…); put those back, or make new episodes"
        )
    if missing := sorted(config.rewards.keys() - record.heads.keys()):
        raise UserError(
            f"rewards.{missing[0]}: the episodes of {folder} have no score of that name (they have "
            f"{', '.join(sorted(record.heads))}); leave it out, or name the reward as that run did"
        )
    data_dir = folder / REPLAY
    max_bytes = run.replay.store_max_bytes(run.rollout.num_actors)
    if data_dir.is_dir() and any(data_dir.iterdir()):
        if config.ray.address is not None:
            raise UserError(
                f"{field} keeps its episodes in {data_dir}, which other machines cannot read; leave out "
                "ray.address"
            )
        return FinishedLog(folder, record.run_id, record.heads, None, data_dir, max_bytes)
    urls = config.replay.redis_urls or record.redis_urls
    if not urls:
        raise UserError(
            f"{field}: its episodes are gone, as its server ended with it; give a run that was trained with "
            "replay.durable=true or with a replay.redis_url"
        )
    if hidden := [url for url in urls if HIDDEN in url]:
        raise UserError(
            f"{field}: its episodes are on the server at {hidden[0]}, whose password a run folder does not "
            "hold; add replay.redis_url with it"
        )
    if record.redis_urls is not None and len(urls) != len(record.redis_urls):
        raise UserError(
            f"replay.redis_url has {len(urls)} addresses, the episodes of {folder} are on "
            f"{len(record.redis_urls)}; give the same ones in the same order"
        )
    log = FinishedLog(folder, record.run_id, record.heads, list(urls), None, max_bytes)
    return replace(log, num_episodes=require_episodes(log, config.replay, urls))


def check_whose_episodes(config: RunConfig, *, is_trusted: bool) -> None:
    """Refuse episodes of somebody else's run: its folder names a server, or has a file of commands that a
    server of ours would carry out.

    Raises:
        UserError: ``replay.from``, or the run that this one trained from, is such a folder.
    """
    folder = config.replay.from_run
    while folder is not None and not is_trusted:
        if not (folder / CONFIG_FILE).exists():  # said where its episodes are looked for
            return
        if not is_own(folder / CONFIG_FILE):
            raise UserError(
                f"replay.from={folder}: {NOT_OWN}; a server that it names is asked for its episodes, or its "
                f"replay/ is carried out by one of ours; add {OPTION} if you trust whom it is from"
            )
        try:
            folder = load_run(folder).replay.from_run
        except UserError:  # likewise
            return


def warn_of_forced(run_folder: Path) -> None:
    """Say in one line that the agent of a run, as its record tells, rejected nearly all that it was shown.

    A forced token says nothing of what accepting another one would have been worth.
    """
    try:
        records = read_metrics(run_folder / METRICS_FILE)
    except OSError:  # it is on another machine, or was deleted
        return
    forced = counted = num_before = 0.0
    for record in records:
        num_episodes, share = record.get(EPISODES) or num_before, record.get("episode/forced_rate")
        if share is not None:  # the mean over the episodes since the record before
            counted += num_episodes - num_before
            forced += share * (num_episodes - num_before)
        num_before = num_episodes
    if counted > 0 and forced / counted > MUCH_FORCED:
        warn(
            f"replay.from={run_folder}: {forced / counted:.0%} of the tokens that its agent decided were "
            "forced, as it rejected all others; such episodes teach little: train on those of a run that "
            "rejects less (agent.accept_bias)"
        )


def require_episodes(log: FinishedLog, replay: ReplayConfig, urls: Sequence[str]) -> int:
    """Refuse a log that is written still, or of which its servers have nothing; how many episodes they have.

    ``urls`` has one address for each shard.

    Where they do not have all of it any more, that is said in one line: an agent trained on the rest may be
    another one.

    Raises:
        UserError: its run goes on, they have nothing, or they cannot be used.
    """
    with ExitStack() as clients:
        opened = [clients.enter_context(connect(url, replay.connect_timeout_s)) for url in urls]
        try:
            is_empty = open_reader(opened, log.run_id, replay).at_end()
            length = log_length(opened, log.run_id)
            writers = [holder for holder in holders(opened[0], log.run_id) if holder.use == "writes"]
        except (ReplayUnavailable, redis.RedisError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"replay.from={log.run_folder}: its server cannot be read ({reason}); look at it, or give "
                "another run"
            ) from error
    if writers:
        left_s = max(writer.seconds_left for writer in writers)
        raise UserError(
            f"replay.from={log.run_folder}: {_goes_on(str(writers[0]))}; if it was killed, that is known in "
            f"{left_s:.0f} s"
        )
    if is_empty:
        raise UserError(
            f"replay.from={log.run_folder}: its server has no episodes of it any more (keys "
            f"mara:{log.run_id}:…); give a run whose episodes were kept"
        )
    if length.num_gone:
        warn(
            f"replay.from={log.run_folder}: {length.num_gone} of its {length.num_appended} episodes are "
            f"gone, the oldest, as they had no room; training goes by the {length.num_kept} that are left. "
            "To keep all, train that run again with a larger replay.log_max_bytes"
        )
    return length.num_kept


def _goes_on(process: str) -> str:
    return f"its run goes on and adds episodes still ({process}); wait for its end, or stop it with SIGTERM"


def _differences(config: RunConfig, run: RunConfig) -> Iterator[str]:
    """What differs in how episodes are made: the setting with both values."""
    if not is_same_llm(run.llm.model, config.llm.model):
        yield f"llm.model={run.llm.model}, this is {config.llm.model}"
    for name in MADE_WITH:
        theirs, ours = _value(run, name), _value(config, name)
        if theirs != ours:
            yield f"{name}={shown(theirs)}, this is {shown(ours)}"


def _value(config: RunConfig, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
