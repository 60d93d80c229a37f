"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mara.common.files import replacing, write_whole


def test_a_file_is_the_old_one_until_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    done: list[tuple[str, str]] = []
    """Each flush: what was flushed, and what the file held at that moment."""
    flush = os.fsync

    def watched(descriptor: int) -> None:
        flush(descriptor)
        done.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, path.read_text()))

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(path, "new")
    assert done == [(".run.json.partial", "old"), (tmp_path.name, "new")]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_a_library_writes_can_be_read_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "weights.safetensors"
    leftover = tmp_path / ".weights.safetensors.partial"
    leftover.touch(0o600)
    before = os.umask(umask)
    try:
        with replacing(path) as partial:
            save_file({"w": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert load_file(path)["w"].tolist() == [0.0, 0.0]
