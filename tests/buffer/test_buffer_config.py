"""Settings of the buffer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from mara.buffer.config import ReplayConfig, ShapingConfig


def test_the_settings_load_without_torch() -> None:
    code = "import sys, mara.buffer.config; sys.exit('torch' in sys.modules or 'redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_setting_is_documented() -> None:
    for model in (ReplayConfig, ShapingConfig):
        undocumented = [name for name, field in model.model_fields.items() if not field.description]
        assert undocumented == []


def test_the_password_is_not_in_the_settings_text() -> None:
    assert "secret" not in repr(ReplayConfig(redis_url="redis://:secret@host"))


def test_pauses_that_shrink_name_both_settings_and_the_remedy() -> None:
    with pytest.raises(ValidationError, match=r"retry_first_s is 3.*retry_longest_s 2.*lower the first"):
        ReplayConfig(retry_first_s=3.0)


def test_a_store_has_room_for_the_log_and_more() -> None:
    config = ReplayConfig(log_max_bytes=1 << 30)
    assert config.store_max_bytes > 1.2 * config.log_max_bytes
