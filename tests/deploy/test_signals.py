"""The first signal asks, the second interrupts."""

from __future__ import annotations

import os
import signal

import pytest

from mara.deploy.signals import StopSignal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_only_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert not stop.requested and stop.exit_status == 0
        send(number)
        assert stop.requested
        assert stop.exit_status == 128 + number
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.exit_status == 128 + number


def test_a_terminal_that_is_closed_asks_once_though_two_tell_of_it() -> None:
    with StopSignal() as stop:
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        assert stop.requested


def test_a_hangup_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_once_nothing_must_be_saved_the_first_signal_interrupts() -> None:
    with StopSignal() as stop:
        stop.interrupt_from_here()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_a_wish_to_stop_from_before_counts_when_nothing_must_be_saved() -> None:
    with StopSignal() as stop:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stop.interrupt_from_here()


def test_a_handler_put_in_our_place_is_replaced_and_the_old_ones_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.install()
        send(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before
