"""Weights that the rollout actors of one machine fetch once for all of them.

::

    store ── one fetch ──► file in memory ── mapped ──► actor, actor, actor, …

Thirty actors that each fetch megabytes from one server keep it busy for seconds after every publication.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mara.buffer.weights import RedisWeightChannel
from mara.common.contracts import VersionedWeights
from mara.common.errors import UserError

_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
# What the library raises for a file that is missing, damaged, removed at that moment or does not fit.
_FILE_TROUBLE = (OSError, SafetensorError, RuntimeError)


def shared_folder() -> Path:
    """Where the files of all runs of this user are: in memory if the system has a place for that."""
    parent = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"mara-{os.getuid()}"


class SharedWeights:
    """A :class:`~mara.common.contracts.WeightSource` for one of several subscribers on a machine.

    Whoever first sees a new version fetches it and writes it to a file; the others, who never wait for that,
    find it there at their next look. The folder of a run can be entered by its user only, and is removed by
    the last subscriber; what killed processes left is removed by the next run. Make one for each thread.
    """

    def __init__(self, source: RedisWeightChannel, run_id: str, parent: Path | None = None) -> None:
        """``parent`` is the folder for all runs; :func:`shared_folder` if None.

        Raises:
            UserError: it is there, and belongs to somebody else.
        """
        self._source = source
        parent = parent or shared_folder()
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.stat().st_uid != os.getuid() or parent.is_symlink():
            raise UserError(f"{parent} belongs to another user; remove it")
        _remove_abandoned(parent)
        self._folder = parent / run_id
        with _locked(
            parent / "lock"
        ):  # Between making a folder and saying that it is used, it would be removed.
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._in_use = os.open(self._folder / "in_use", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._in_use, fcntl.LOCK_SH)

    def fetch_newer(self, than: int, skip: int | None = None) -> VersionedWeights | None:
        """See :class:`~mara.common.contracts.WeightSource`; None, too, while another one fetches them."""
        latest = self._source.latest_version()
        if latest is None or latest <= than or latest == skip:
            return None
        if (found := self._read(latest)) is not None:
            return found
        with ExitStack() as exits:
            try:
                is_mine = exits.enter_context(_locked(self._folder / "fetching", wait=False))
            except OSError:  # Somebody has removed the folder: everyone for himself.
                return self._source.fetch_newer(than, skip)
            if not is_mine:
                return None
            if (found := self._read(latest)) is not None:  # written while the lock was asked for
                return found
            if (fetched := self._source.fetch_newer(than, skip)) is not None:
                self._write(fetched)
            return fetched

    def close(self) -> None:
        """Leave the folder to the others; the last one removes it. Does nothing twice."""
        if self._in_use < 0:
            return
        os.close(self._in_use)
        self._in_use = -1
        _remove_abandoned(self._folder.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, version: int) -> VersionedWeights | None:
        """The weights of ``version``; None if they are not there, or not any more."""
        try:
            with safe_open(self._folder / f"{version}.safetensors", framework="pt") as file:
                card = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except _FILE_TROUBLE:
            return None
        return VersionedWeights(version, float(card["published_at_s"]), tensors, card["agent_digest"])

    def _write(self, weights: VersionedWeights) -> None:
        """Put the weights where the others find them whole; only whoever holds the lock does."""
        older = self._folder.glob("*.safetensors")
        card = {"published_at_s": repr(weights.published_at_s), "agent_digest": weights.agent_digest}
        partial = self._folder / "partial"
        # What readers have mapped stays theirs. First, so that there is room.
        for path in older:
            path.unlink(missing_ok=True)
        try:
            save_file(weights.tensors, partial, metadata=card)
            partial.rename(self._folder / f"{weights.version}.safetensors")
        except _FILE_TROUBLE:  # No room: the others fetch for themselves, one after another.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file that is made if missing; whether it was free, if it is not waited for."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)  # releases the lock


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of runs that nobody uses."""
    with _locked(parent / "lock"):
        for folder in parent.iterdir():
            if folder.is_dir():
                with _locked(folder / "in_use", wait=False) as is_unused:
                    if is_unused:
                        shutil.rmtree(folder, ignore_errors=True)
