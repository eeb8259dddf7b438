"""The mailbox: order, waking, and that waking costs its writer nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from phid.mailbox import Mailbox


@pytest.fixture
def mailbox() -> Iterator[Mailbox[int]]:
    box: Mailbox[int] = Mailbox()
    yield box
    box.close()


def test_what_is_put_in_comes_out_in_order(mailbox: Mailbox[int]) -> None:
    for n in range(1000):
        mailbox.put(n)
    assert [mailbox.get(0) for _ in range(1000)] == list(range(1000))
    assert mailbox.get(0) is None
    assert mailbox.get(-1.0) is None


def test_an_empty_one_is_waited_at_for_as_long_as_asked(mailbox: Mailbox[int]) -> None:
    began = time.monotonic()
    assert mailbox.get(0.05) is None
    assert time.monotonic() - began >= 0.05


def test_its_reader_is_woken(mailbox: Mailbox[int]) -> None:
    threading.Timer(0.05, mailbox.put, (7,)).start()
    began = time.monotonic()
    assert mailbox.get(60.0) == 7
    assert time.monotonic() - began < 30


def test_an_old_ring_wakes_it_once_at_most(mailbox: Mailbox[int]) -> None:
    threading.Timer(0.05, lambda: [mailbox.put(n) for n in (1, 2)]).start()
    assert [mailbox.get(60.0), mailbox.get(60.0)] == [1, 2]
    while mailbox.get(0.05) is not None:
        pass
    began = time.monotonic()
    assert mailbox.get(0.05) is None
    assert time.monotonic() - began >= 0.05


def test_many_writers_lose_nothing_and_each_keeps_its_order(mailbox: Mailbox[int]) -> None:
    writers, each = 4, 5000

    def write(first: int) -> None:
        for n in range(each):
            mailbox.put(first + n)

    threads = [threading.Thread(target=write, args=(w * each,)) for w in range(writers)]
    for thread in threads:
        thread.start()
    got = []
    while len(got) < writers * each:
        item = mailbox.get(30.0)
        assert item is not None, f"lost after {len(got)}"
        got.append(item)
    for thread in threads:
        thread.join()
    for w in range(writers):
        of_one = [n for n in got if w * each <= n < (w + 1) * each]
        assert of_one == list(range(w * each, (w + 1) * each))


def test_a_signal_handler_may_put_into_it(mailbox: Mailbox[int]) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: mailbox.put(1))
    try:
        me = threading.get_ident()
        threading.Timer(0.05, signal.pthread_kill, (me, signal.SIGUSR1)).start()
        assert mailbox.get(60.0) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_closed_one_takes_what_nobody_reads(mailbox: Mailbox[int]) -> None:
    mailbox.close()
    mailbox.put(1)
    mailbox._reader_waits = True  # as if its reader had been killed in its sleep
    mailbox.put(2)
