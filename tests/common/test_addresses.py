"""What is shown of an address holds no password, whatever the password is made of."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mara.common.addresses import hide_password, hide_passwords, may_hold_password

SECRET = "s3cr3t"
ADDRESSES = [
    "redis://:{}@host",
    "redis://me:{}@host:6379/0",
    "unix://:{}@/run/store.sock?db=1",
    "rediss://me:{}@host?ssl_certfile=x",
    "redis://host:6379/0?password={}",
    "redis://host/0?password={}&db=1",
    "redis://me@host/0?db=1&ssl_password={}",
    "unix:///run/store.sock?pass%77ord={}",
    "redis://:{0}@host/0?password={0}",
]
AROUND = st.text(st.sampled_from("@:/?#&=%+.,;[]'\"x1"), max_size=6) | st.just("://") | st.just("?password=")


@given(st.sampled_from(ADDRESSES), AROUND, AROUND)
@example("redis://host/0?password={}", "a@", "")
@example("redis://host/0?password={}", "a&", "=1")
@example("redis://me:{}@host:6379/0", "", "://")
def test_no_part_of_a_password_is_shown_whatever_stands_around_it(address: str, before: str, after: str):
    url = address.format(before + SECRET + after)
    shown = hide_password(url)
    assert SECRET not in shown
    assert hide_password(shown) == shown
    assert may_hold_password(url)
    assert SECRET not in hide_passwords(f"replay.redis_url: {url} is full; raise its maxmemory")


@given(st.sampled_from(ADDRESSES), st.text(st.characters(codec="utf-8"), max_size=6))
def test_a_password_may_hold_spaces_and_line_breaks(address: str, before: str):
    assert SECRET not in hide_password(address.format(before + SECRET))


@pytest.mark.parametrize("url", ["redis://host:6379/0", "unix:///run/store.sock?db=1", "rediss://[::1]:1"])
def test_an_address_without_a_password_is_shown_as_it_is(url: str):
    assert hide_password(url) == url
    assert hide_passwords(f"at {url}, today") == f"at {url}, today"
    assert not may_hold_password(f"at {url}, today")


def test_the_place_and_the_user_are_shown():
    assert hide_password("redis://me:s3cr3t@host:6379/0") == "redis://me:***@host:6379/0"
    assert hide_password("redis://host/0?db=1&password=s3cr3t") == "redis://host/0?db=1&password=***"
    assert hide_password("me:s3cr3t@host") == "me:***@host"
