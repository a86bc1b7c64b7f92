"""The worker's end of a child's socket, on a real pair of sockets."""

from __future__ import annotations

import socket

import pytest

from memsafe_pool.link import Link


class Hub:
    """Keeps what it is to call."""

    def __init__(self):
        self.readers, self.writers = {}, {}

    def add_reader(self, descriptor, *call):
        self.readers[descriptor] = call

    def add_writer(self, descriptor, *call):
        self.writers[descriptor] = call

    def remove(self, descriptor):
        self.readers.pop(descriptor, None)
        self.writers.pop(descriptor, None)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    link = Link(ours)
    with theirs:
        yield link, theirs
        link.close()


def test_what_does_not_fit_is_written_when_there_is_room(pair):
    """In order and once; and by way of whoever knows whether something is under way already."""
    link, theirs = pair
    hub, posted = Hub(), []

    def post(function, *arguments):
        posted.append(function)
        function(*arguments)

    link.attach(hub, post, print)
    data = [bytes([number]) * 500_000 for number in range(4)]
    assert all(map(link.send, data))
    assert link.writing
    received = b""
    while link.writing:
        received += theirs.recv(1 << 20)
        [(call, *arguments)] = hub.writers.values()
        assert call is post
        call(*arguments)
    while len(received) < 2_000_000:
        received += theirs.recv(1 << 20)
    assert received == b"".join(data)
    assert posted
    assert not hub.writers
