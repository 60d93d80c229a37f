"""Addresses with a password in them, as messages, logs and saved settings may show them. Imports no torch."""

from __future__ import annotations

import re

HIDDEN = "***"


def hide_password(url: str) -> str:
    """``redis://me:secret@host`` becomes ``redis://me:***@host``, ``?password=secret`` is ``?password=***``.

    What follows a password among the options is hidden with it: an ``&`` may be part of the password.
    An address that cannot be taken apart hides too much rather than too little: a user name alone may be a
    password whose ``:`` was forgotten, and a password may hold ``/``, ``?`` and ``@``.
    """
    start = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url)
    scheme = start[0] if start else ""
    user_info, at, place = url.removeprefix(scheme).rpartition("@")
    if _SECRET_OPTION.search(user_info):
        return scheme + HIDDEN
    if at:
        user = re.match(r"([^:@/?#]*):", user_info)
        user_info = f"{user[1]}:{HIDDEN}" if user else HIDDEN
    return scheme + user_info + at + _SECRET_OPTION.sub(rf"\g<1>{HIDDEN}", place)


def hide_passwords(text: str) -> str:
    """``text`` with the password of every address in it hidden. An address ends at the first space."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", lambda found: hide_password(found[0]), text)


def may_hold_password(text: str) -> bool:
    """Whether there is an address with more than a host in ``text``, which need not be one alone."""
    return "://" in text and ("@" in text or _SECRET_OPTION.search(text) is not None)


# A name with %XX in it may be "password" as well.
_SECRET_OPTION = re.compile(r"([?&][^=&]*(?:password|%)[^=&]*=).*", re.IGNORECASE | re.DOTALL)
