"""Settings of the buffer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from mara.buffer.config import APPEND_BYTES, READ_BYTES, ReplayConfig, ShapingConfig


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


def test_a_store_has_room_for_the_log_and_what_is_on_its_way_to_and_fro() -> None:
    config = ReplayConfig(log_max_bytes=1 << 30)
    assert config.store_max_bytes(0) > 1.2 * config.log_max_bytes + READ_BYTES
    assert config.store_max_bytes(8) - config.store_max_bytes(0) > 8 * APPEND_BYTES


def test_the_store_of_a_small_run_stays_small() -> None:
    assert ReplayConfig(log_max_bytes=256 << 20).store_max_bytes(2) <= 576 << 20


def test_a_deviation_frozen_after_a_few_episodes_is_refused() -> None:
    with pytest.raises(ValidationError, match="normalise_episodes"):
        ShapingConfig(normalise="running", normalise_episodes=15)
