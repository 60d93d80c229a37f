"""Files that are the old or the new one at any moment, also after a power cut. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path`` to write a file under; at the block's end it takes the place of ``path``.

    By then its content is on disk, so that ``path`` never is a file without it. Where the block raises,
    ``path`` stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed
        with readable(partial):
            yield partial
        flush_to_disk(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """The new file ``path``, which a library writes in the block, gets the permissions that the umask leaves.

    safetensors writes files that nobody but their owner can read.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # The umask itself cannot be asked for without changing it.
    try:
        yield
    except SafetensorError as error:  # Its own error where the disk is full; it does not name the file.
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
    path.chmod(mode)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, as :func:`replacing` does.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on disk.

    Raises:
        OSError: they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
