"""The store of one run, with its replay log and its weights: who runs it, and that it stays.

::

    replay.redis_url      the user's servers, which are only used
    neither               a server of the run's own; with replay.durable its file is in RUN/replay/
    replay.from=RUN       the servers that have the episodes of that run, or one on a copy of its file
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import redis

from mara.buffer.connection import connect
from mara.buffer.keys import keys_of
from mara.buffer.lease import Use, hold_lease, holders
from mara.buffer.runs import LogLength, log_length
from mara.buffer.server import EmbeddedServer, Loading
from mara.common.addresses import hide_password
from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.exit import RunFailed
from mara.deploy.finished_run import FinishedLog, require_episodes
from mara.deploy.preflight import Checked
from mara.deploy.progress import Progress
from mara.deploy.run_folder import REPLAY, LogRecord, what_is_saved

MAX_SERVER_RESTARTS = 20


class Store:
    """The servers of a run. The run's own, if it has one, is started again when it dies."""

    def __init__(self, redis_urls: Sequence[str], server: EmbeddedServer | None = None) -> None:
        """``server`` is the run's own: the one to look after."""
        self.redis_urls = tuple(redis_urls)
        """The address of each shard, with its password."""
        self._server = server
        self._num_restarts = 0

    def keep(self, config: RunConfig, folder: Path, progress: Progress) -> None:
        """Start the run's own server again if it died: the others go on as soon as it answers.

        A signal ends the waiting for it, not the server.

        Raises:
            RunFailed: it does not start, or has died too often.
        """
        if self._server is None or self._server.pid is not None:
            return
        self._num_restarts += 1
        if self._num_restarts > MAX_SERVER_RESTARTS:
            raise RunFailed(
                f"the server for episodes and weights died {self._num_restarts} times; the run ends; "
                f"{what_is_saved(folder)}; free memory first, or start a new run with a lower "
                "replay.log_max_bytes"
            )
        try:
            self._server.start(_shown_by(progress))
        except UserError as error:
            raise RunFailed(f"{error}; the run ends; {what_is_saved(folder)}") from error
        kept = "its data are kept" if config.replay.durable else "episodes that were unread are lost"
        progress.display.say(f"the server for episodes and weights died and was started again; {kept}")


@contextmanager
def open_store(
    config: RunConfig, checked: Checked, folder: Path, run_id: str, progress: Progress
) -> Iterator[Store]:
    """The store of the run in ``folder``; servers that were started for it end with the block.

    Where the run writes episodes, ``RUN/replay.json`` tells later runs where they are. Until the block ends,
    others see that the run goes on, by a lease on servers that are not its own.

    Raises:
        UserError: a server does not start, or has no episodes of the finished run.
        StoppedEarly: a signal came.
    """
    with ExitStack() as exits:
        if checked.log is not None:
            store, num_episodes = _with_log(checked.log, config, folder, progress, exits)
            if num_episodes < (wanted := config.learner.num_episodes):
                progress.view.num_episodes = num_episodes
                progress.display.say(
                    f"the run at replay.from has {num_episodes} episodes of the {wanted} that "
                    "learner.num_episodes asks for: training ends after those"
                )
            yield store
            return
        _record_log(run_id, config.replay.redis_urls, checked, folder)
        if config.replay.redis_urls:
            exits.enter_context(_lease(config, config.replay.redis_urls, run_id, "writes"))
            yield Store(config.replay.redis_urls)
            return
        progress.state("starting the server for episodes and weights")
        max_bytes = config.replay.store_max_bytes(config.rollout.num_actors)
        data_dir = folder / REPLAY if config.replay.durable else None
        server = _started(EmbeddedServer(max_bytes, data_dir), progress, exits)
        yield Store([server.url], server)


def with_addresses(config: RunConfig, redis_urls: Sequence[str]) -> RunConfig:
    """The settings as the processes of the run get them: with the addresses of its store."""
    replay = config.replay.model_copy(update={"redis_url": tuple(redis_urls)})
    return config.model_copy(update={"replay": replay})


def check_unused(config: RunConfig, folder: Path, run_id: str) -> None:
    """Refuse to go on with a run that does so already, from another machine, or whose log is being read.

    Raises:
        UserError: that is so, or a server cannot be used.
    """
    with ExitStack() as exits:
        for client in _clients(config, config.replay.redis_urls, exits):
            with _its_trouble(folder):
                users = holders(client, run_id)
            for holder in users:
                what = "this run goes on still" if holder.use == "writes" else "its log is being read"
                raise UserError(
                    f"{folder}: {what} ({holder}); wait for the end of that, or stop it first; if it was "
                    f"killed, that is known in {holder.seconds_left:.0f} s"
                )


def take_up_log(config: RunConfig, store: Store, run_id: str) -> LogLength:
    """What the servers have of the episodes of a run that goes on. Its weights are forgotten.

    Those may be of a later step than its checkpoint, and nobody would take earlier ones.

    Raises:
        UserError: a server cannot be used.
    """
    with ExitStack() as exits:
        clients = _clients(config, store.redis_urls, exits)
        keys = keys_of(run_id)
        with _its_trouble(f"run {run_id}"):
            clients[0].delete(keys.weights, keys.tensors)
            return log_length(clients, run_id)


@contextmanager
def _its_trouble(what: Path | str) -> Iterator[None]:
    """Turn what a server says into one line."""
    try:
        yield
    except redis.RedisError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{what}: its server at replay.redis_url cannot be used ({reason}); look at that"
        ) from error


def _clients(config: RunConfig, urls: Sequence[str], exits: ExitStack) -> list[redis.Redis]:
    return [exits.enter_context(connect(url, config.replay.connect_timeout_s)) for url in urls]


def _lease(config: RunConfig, urls: Sequence[str], run_id: str, use: Use) -> AbstractContextManager[None]:
    return hold_lease(urls, run_id, use, config.replay.connect_timeout_s)


def _record_log(run_id: str, redis_urls: Sequence[str], checked: Checked, folder: Path) -> None:
    """Note for later runs where the episodes of this one are."""
    shown = [hide_password(url) for url in redis_urls] or None
    LogRecord(
        run_id=run_id,
        redis_urls=shown,
        hidden_size=checked.hidden_size,
        llm_digest=checked.llm_digest,
        heads=checked.reward_digests,
        prompts_digest=checked.prompts_digest,
    ).write(folder)


def _with_log(
    log: FinishedLog, config: RunConfig, folder: Path, progress: Progress, exits: ExitStack
) -> tuple[Store, int]:
    """The servers that have the episodes of a finished run, or one that is started on a copy of its file.

    Also how many episodes they have.
    """
    if log.data_dir is None:
        assert log.redis_urls is not None and log.num_episodes is not None
        exits.enter_context(_lease(config, log.redis_urls, log.run_id, "reads"))
        return Store(log.redis_urls), log.num_episodes
    progress.state("starting a server with a copy of the episodes")
    # A server writes to the file it opens; the run's own stays as it is.
    copy = folder / f".{log.data_dir.name}.copy"
    exits.callback(shutil.rmtree, copy, ignore_errors=True)
    data_dir = log.data_dir

    def copy_unless_stopped(source: str, target: str) -> None:
        if not progress.stop.requested:
            shutil.copy2(source, target)

    shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed, and goes on now
    progress.wait_for(lambda: _copied(data_dir, copy, copy_unless_stopped))
    progress.state("starting a server with a copy of the episodes")  # ends here after a signal
    server = _started(EmbeddedServer(log.max_bytes, copy), progress, exits)
    return Store([server.url]), require_episodes(log, config.replay, [server.url])


def _started(server: EmbeddedServer, progress: Progress, exits: ExitStack) -> EmbeddedServer:
    """Start a server that ends with ``exits``.

    Raises:
        UserError: it does not start.
        StoppedEarly: a signal came while it loaded its file.
    """
    exits.callback(server.stop)
    what = progress.view.state
    server.start(_shown_by(progress))
    progress.state(what)
    return server


def _shown_by(progress: Progress) -> Callable[[Loading], bool]:
    """Shows how far a server has come that loads its file; waits for it until a signal comes."""
    what = progress.view.state

    def show(loading: Loading) -> bool:
        progress.view.state = f"{what}: it reads its file, {loading}"
        progress.display.refresh()
        return not progress.stop.requested

    return show


def _copied(source: Path, target: Path, copy_file: Callable[[str, str], object]) -> None:
    """Copy a folder.

    Raises:
        UserError: a file of it went away: the run is still going on.
    """
    try:
        shutil.copytree(source, target, copy_function=copy_file)
    except shutil.Error as error:
        raise UserError(
            f"{source} changes while it is copied ({error.args[0][0][2]}); wait for that run to end"
        ) from error
