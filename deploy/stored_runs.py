"""``mara store``: what runs have left on a server, and its deletion."""

from __future__ import annotations

import difflib
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import redis

from mara.buffer.connection import connect
from mara.buffer.lease import Holder, holders
from mara.buffer.runs import StoredRun, delete_run, runs_at
from mara.common.addresses import hide_password
from mara.common.errors import UserError
from mara.deploy.console import say


def list_runs(url: str) -> None:
    """Say one line for each run that has keys on the server at ``url``.

    Raises:
        UserError: it cannot be used.
    """
    with connect(url, writes=False, field="URL") as client:
        try:
            runs = [(run, holders(client, run.run_id)) for run in runs_at(client)]
        except redis.RedisError as error:
            raise _trouble(url, error) from error
    if not runs:
        say(f"no runs have anything on {hide_password(url)}")
    for run, users in runs:
        say(_line(run, users))


def delete_runs(url: str, runs: Sequence[str], *, is_meant: bool) -> None:
    """Delete what ``runs`` have on the server at ``url``; unless it ``is_meant``, only say what would go.

    A run is given by its id, or by its folder or the folder's name.

    Raises:
        UserError: it cannot be used, has nothing of a run, or a run is in use: nothing is deleted.
    """
    with connect(url, writes=False, field="URL") as client:
        try:
            stored = {run.run_id: run for run in runs_at(client)}
            run_ids = list(dict.fromkeys(_run_id(run, stored, url) for run in runs))
            for run_id in run_ids:
                if users := holders(client, run_id):
                    raise UserError(
                        f"run {run_id} is in use: {_used(users)}; wait for the end of that, or stop it with "
                        "SIGTERM"
                    )
            for run_id in run_ids:
                if is_meant:
                    delete_run(client, run_id)
                say(f"{'deleted' if is_meant else 'would be deleted'}: {_line(stored[run_id], [])}")
        except redis.RedisError as error:
            raise _trouble(url, error) from error
    if not is_meant:
        say("nothing was deleted; add --yes to do it")


def _run_id(run: str, stored: Collection[str], url: str) -> str:
    """The id, of those that are ``stored`` at ``url``, of a run that is given by it or by its folder.

    Raises:
        UserError: none is, or more than one may be meant.
    """
    if run in stored:
        return run
    from mara.deploy.run_folder import is_id_of, read_run_record  # Imports torch.

    folder = Path(run)
    if (record := read_run_record(folder)) is not None:
        if record.run_id in stored:
            return record.run_id
        raise UserError(
            f"{hide_password(url)} has nothing of the run in {run} ({record.run_id}); `mara store list` "
            "shows what it has"
        )
    of_name = [run_id for run_id in stored if is_id_of(run_id, folder.name)]
    if len(of_name) == 1:
        return of_name[0]
    if of_name:
        raise UserError(f"{run!r} may be any of {', '.join(of_name)}; give one of them")
    near = difflib.get_close_matches(folder.name, stored, n=1)
    remedy = f"did you mean {near[0]}?" if near else "`mara store list` shows what it has"
    raise UserError(f"{hide_password(url)} has nothing of a run {run!r}; {remedy}")


def _line(run: StoredRun, users: Sequence[Holder]) -> str:
    parts = [run.run_id, f"{run.num_episodes} episodes", f"{run.num_bytes / 1e6:.1f} MB"]
    if run.last_episode_s is not None:
        newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.last_episode_s))
        parts.append(f"newest of {newest}")
    if users:
        parts.append(_used(users))
    return " | ".join(parts)


def _used(users: Sequence[Holder]) -> str:
    """Who writes and who reads."""
    doing = {"writes": "it goes on", "reads": "a run trains on its episodes"}
    return ", ".join(f"{doing[user.use]} ({user})" for user in users)


def _trouble(url: str, error: redis.RedisError) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{hide_password(url)} cannot be asked ({reason}); look at the server")
