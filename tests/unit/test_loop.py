"""The event loop for brokers without one, and the way into it from other threads."""

from __future__ import annotations

import threading

import pytest
from kombu.asynchronous import Hub

from memsafe_pool.loop import LoopThread, Mailbox, run_until


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def mailbox():
    mailbox = Mailbox()
    yield mailbox
    mailbox.close()


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_the_owners_own_post_is_a_call(mailbox):
    """What the owner posts has been done when ``post`` returns."""
    heard = []
    mailbox.post(heard.append, 1)
    assert heard == [1]


def test_posts_of_other_threads_wait_for_the_loop(mailbox, hub):
    """The loop makes them in order in the owner's thread; more of them than the socket has room for."""
    heard = []
    mailbox.attach(hub)

    def post():
        for number in range(5000):
            mailbox.post(lambda n: heard.append((n, threading.get_ident())), number)

    in_a_thread(post)
    assert heard == []
    run_until(hub, lambda: len(heard) == 5000)
    assert heard == [(number, threading.get_ident()) for number in range(5000)]


def test_a_call_may_post(mailbox, hub):
    """A call that posts has that done at once, as it runs in the owner."""
    heard = []
    mailbox.attach(hub)

    def outer():
        mailbox.post(heard.append, "inner")
        heard.append("outer")

    in_a_thread(lambda: mailbox.post(outer))
    run_until(hub, lambda: len(heard) == 2)
    assert heard == ["inner", "outer"]


def test_a_call_that_fails_does_not_keep_the_others(mailbox, hub):
    """The loop's round ends with the exception, the next one goes on behind it."""
    heard = []
    mailbox.attach(hub)

    def post():
        mailbox.post([].pop)
        mailbox.post(heard.append, 1)

    in_a_thread(post)
    with pytest.raises(IndexError):
        run_until(hub, lambda: heard)
    assert mailbox.failed
    run_until(hub, lambda: heard)


def test_calls_can_be_made_before_the_loop_does(mailbox):
    """All that wait, at once."""
    heard = []
    in_a_thread(lambda: [mailbox.post(heard.append, number) for number in range(3)])
    mailbox.deliver()
    assert heard == [0, 1, 2]


def test_ownership_moves(mailbox, hub):
    """After ``own`` the calls are the new owner's."""
    heard = []
    mailbox.attach(hub)

    def take_over():
        mailbox.own()
        mailbox.post(heard.append, threading.get_ident())

    in_a_thread(take_over)
    assert heard != [threading.get_ident()]
    assert len(heard) == 1
    mailbox.post(heard.append, "not the owner any more")
    assert len(heard) == 1


def test_a_loop_in_a_thread():
    """It runs ``prepare`` first, then what is asked of it, and ends when told to."""
    crashes, heard = [], []
    loop = LoopThread(crashes.append)
    loop.start(lambda: heard.append("prepared"))
    assert heard == ["prepared"]
    done = threading.Event()
    loop.hub.call_soon(done.set)
    assert done.wait(30)
    loop.hub.call_soon(loop.stop)
    assert loop.join(30)
    assert not crashes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_loop_that_fails_says_so(caplog, error):
    """An exception that nothing handles ends the loop, is logged, and is told."""
    crashes = []
    loop = LoopThread(crashes.append)
    loop.start(lambda: None)

    def fail():
        raise error("in the loop")

    loop.hub.call_soon(fail)
    assert loop.join(30)
    assert [str(error) for error in crashes] == ["in the loop"]
    assert "in the loop" in caplog.text
