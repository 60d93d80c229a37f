"""Publishing weights in a thread of its own, so that the training loop never waits for the store.

::

    training loop ── copy ──► latest not yet stored ── serialise, send ──► store
                              (a later one replaces it)   publisher's thread
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch

from mara.common.contracts import WeightSink

logger = logging.getLogger(__name__)

_RETRY_S = 0.05
"""Pause after the store did not take a publication."""
_CLOSE_S = 5.0
"""How long the end waits for the last publication."""


class BackgroundWeights:
    """A :class:`~mara.common.contracts.WeightSink` in front of another, which it has to itself.

    A publication that the store does not take is tried again until it is stored or a later one has replaced
    it. Whatever the other sink raises is raised by the next call. Called from one thread; :meth:`close` it,
    or use it in ``with``.
    """

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink
        self._changed = threading.Condition()
        self._waiting: tuple[int, dict[str, torch.Tensor]] | None = None
        self._in_hand = False
        """Whether the thread is at a publication."""
        self._asked: int | None = None
        """Version that the thread shall look for in the store."""
        self._is_lost = False
        self.num_replaced = 0
        """Publications taken so far that a later one replaced before they were stored."""
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="weight publisher", daemon=True)
        self._thread.start()

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Take a copy of ``tensors``, to be stored as soon as the store takes them; always True.

        Raises whatever storing an earlier version raised.
        """
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        with self._changed:
            self._raise_error()
            self.num_replaced += self._waiting is not None
            self._waiting = (version, copies)
            self._is_lost = False
            self._changed.notify_all()
        return True

    def holds(self, version: int) -> bool:
        """Whether the store had ``version`` or a later one when the thread last looked; it looks again now.

        True while a publication is on its way. Raises whatever storing an earlier version raised.
        """
        with self._changed:
            self._raise_error()
            if self._waiting is not None or self._in_hand:
                return True
            self._asked = version
            self._changed.notify_all()
            return not self._is_lost

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """End the thread once the last publication is stored, or after ``timeout_s``; warn if it is not."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not (self._waiting or self._in_hand), timeout_s
            )
            if self._error is not None:
                logger.warning("the last weights were not published: %s", self._error)
            elif self._waiting or self._in_hand:
                logger.warning("the last weights were not published: the store did not take them")
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_CLOSE_S if error is None else 0.0)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._do_next():
                pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._in_hand = False
                self._changed.notify_all()

    def _do_next(self) -> bool:
        """Wait for something to do, and do it; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._asked is not None or self._closing)
            if self._closing:
                return False
            publication, self._waiting = self._waiting, None
            asked, self._asked = self._asked, None
            self._in_hand = publication is not None
        if publication is None:
            assert asked is not None
            is_held = self._sink.holds(asked)
            with self._changed:
                self._is_lost = not is_held and self._waiting is None
            return True
        while not self._sink.publish(*publication):
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting or self._closing, _RETRY_S):
                    self.num_replaced += self._waiting is not None
                    break
        with self._changed:
            self._in_hand = False
            self._changed.notify_all()
        return True
