import os
import signal
import threading

import pytest

from bunny_lora.core import interrupts
from bunny_lora.errors import BunnyLoraError


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stop_drops_what_is_stoppable_and_becomes_a_message(number: int, code: int) -> None:
    done = []
    with pytest.raises(interrupts.StoppedError) as caught, interrupts.watch(), interrupts.stoppable():
        send(number)
        done.append("more")
    assert not done
    assert caught.value.exit_code == code and isinstance(caught.value, BunnyLoraError)


def test_elsewhere_a_stop_waits_for_the_next_stoppable_block() -> None:
    done = []
    with pytest.raises(interrupts.StoppedError), interrupts.watch():
        send()
        done.append("written")
        with interrupts.stoppable():
            done.append("computed")
    assert done == ["written"]


def test_a_second_stop_does_not_disturb_the_last_save() -> None:
    saved = []
    with pytest.raises(interrupts.StoppedError), interrupts.watch():
        try:
            with interrupts.stoppable():
                send()
        except interrupts.StopRequest:
            send()
            with interrupts.stoppable():
                saved.append("state")
            raise
    assert saved


def test_the_old_handlers_come_back_and_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.watch(), interrupts.stoppable():
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_is_taken_over() -> None:
    seen = []

    def work() -> None:
        with interrupts.watch(), interrupts.stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
