"""Whose folder it is that says what is called.

The settings of a run or a comparison may name functions, which are imported, and servers, which are sent
prompts and keys. Those of this user's own folders are called as they stand; others need ``--trust``::

    FOLDER/config.yaml       the settings
    FOLDER/config.hmac       their signature: HMAC-SHA-256 of that file, by the user's key
    ~/.local/state/mara/key  the key ($XDG_STATE_HOME/mara/key if that is set), which only the user reads
"""

from __future__ import annotations

import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mara.actors.reward_models.config import FunctionRewardConfig, HttpRewardConfig
from mara.common.errors import UserError
from mara.common.files import write_whole
from mara.deploy.comparison.config import ComparisonConfig, LLMJudgeConfig
from mara.deploy.config import AgentUse, RunConfig

KEY_BYTES = 32
OPTION = "--trust"
NOT_OWN = (
    "its settings are not as `mara` wrote them for you here: it is another user's, of another home, of a "
    "time when no key could be kept, or was edited"
)


def sign(settings: Path) -> None:
    """Mark the file ``settings`` as this user's. Left out where the user has no place for a key.

    Raises:
        OSError: its folder cannot be written.
    """
    if (key := _key(make=True)) is not None:
        write_whole(_signature_file(settings), _signature(key, settings) + "\n")


def is_own(settings: Path) -> bool:
    """Whether the file ``settings`` is as this user's ``mara`` wrote it last."""
    if (key := _key()) is None:
        return False
    try:
        found = _signature_file(settings).read_bytes().strip()
        return hmac.compare_digest(found, _signature(key, settings).encode())
    except OSError:
        return False


def called_by_rewards(config: AgentUse) -> list[str]:
    """The functions and servers that an evaluation calls, as ``setting=value``."""
    return _called("rewards", config.rewards)


def called_by_run(config: RunConfig) -> list[str]:
    """The same of a training."""
    servers = [f"replay.redis_url={url}" for url in config.replay.redis_urls]
    return [*called_by_rewards(config), *servers, *_cluster(config.ray.address)]


def called_by_comparison(config: ComparisonConfig) -> list[str]:
    """The same of a comparison."""
    return [*_called("judges", config.judges), *_cluster(config.ray.address)]


def check_trusted(settings: Path, named: list[str], called: list[str], *, is_trusted: bool) -> None:
    """Refuse to call what a folder of somebody else names.

    Args:
        settings: the file with its settings.
        named: what these call by themselves.
        called: what is going to be called, with the settings that the user has changed.
        is_trusted: the user has given ``--trust``.

    Raises:
        UserError: it would be.
    """
    foreign = [name for name in called if name in named]
    if foreign and not is_trusted and not is_own(settings):
        raise UserError(
            f"{settings} names what would be called ({', '.join(foreign)}); {NOT_OWN}; look at it, and add "
            f"{OPTION} if you trust whom it is from"
        )


def _called(group: str, settings: Mapping[str, object]) -> list[str]:
    found = []
    for name, config in settings.items():
        if isinstance(config, FunctionRewardConfig):
            found.append(f"{group}.{name}.function={config.function}")
        elif isinstance(config, HttpRewardConfig | LLMJudgeConfig):
            found.append(f"{group}.{name}.url={config.url}")
    return found


def _cluster(address: str | None) -> list[str]:
    return [] if address is None else [f"ray.address={address}"]


def _signature_file(settings: Path) -> Path:
    return settings.with_suffix(".hmac")


def _signature(key: bytes, settings: Path) -> str:
    return hmac.new(key, settings.read_bytes(), "sha256").hexdigest()


def _key(*, make: bool = False) -> bytes | None:
    """The user's key; None if there is none, and none can be made or none shall be."""
    try:
        # A relative one is void by the XDG specification, and would let the current folder bring a key along.
        given = Path(os.environ.get("XDG_STATE_HOME") or "")
        path = (given if given.is_absolute() else Path.home() / ".local" / "state") / "mara" / "key"
        if make and not path.exists():
            _make_key(path)
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None  # Others know it.
        key = path.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where the home is.
        return None
    # Half a key, of a full disk, would be one that others can guess.
    return key if len(key) == KEY_BYTES else None


def _make_key(path: Path) -> None:
    """Put a new key at ``path``, whole or not at all, unless another process is quicker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent)  # for the user's eyes only
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        path.hardlink_to(partial)
    except FileExistsError:
        pass
    finally:
        os.unlink(partial)
