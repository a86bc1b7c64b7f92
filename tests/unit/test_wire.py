"""The messages between worker and child, however the socket cuts them."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool import wire
from memsafe_pool.wire import HEAD, Reader

MESSAGES = st.lists(
    st.tuples(
        st.sampled_from([wire.TASK, wire.STOP, wire.UP, wire.ACK, wire.DONE, wire.FAILED, wire.TRIMMED]),
        st.integers(0, 2**64 - 1),
        st.floats(allow_nan=False),
        st.binary(max_size=60) | st.builds(lambda size: b"x" * size, st.integers(60, 5000)),
    ),
    max_size=12,
)


def test_a_report_comes_through():
    """What a child has packed is what the worker unpacks, whatever follows it."""
    report = wire.Report(6, 5, 4, 3, 2, 2**63, 7)
    assert wire.Report.unpack(memoryview(wire.REPORT.pack(*report) + b"more")) == report


def packed(messages):
    return b"".join(
        wire.head(kind, len(payload), job, number) + payload for kind, job, number, payload in messages
    )


def plain(messages):
    return [(kind, job, number, bytes(payload)) for kind, job, number, payload in messages]


@st.composite
def streams(draw):
    """Messages, and their bytes in pieces."""
    messages = draw(MESSAGES)
    stream = packed(messages)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    bounds = [0, *cuts, len(stream)]
    return messages, [stream[start:end] for start, end in itertools.pairwise(bounds)]


@given(streams())
def test_any_messages_in_any_pieces(stream):
    """Every sequence of messages comes out as it went in, however it is cut, and nothing is left over."""
    messages, pieces = stream
    reader = Reader()
    found = [message for piece in pieces for message in plain(reader.feed(piece))]
    assert found == messages
    assert not reader.partial


@given(MESSAGES)
def test_byte_by_byte(messages):
    """One byte at a time, each message is complete with its last byte and not before."""
    reader = Reader()
    for message in messages:
        *most, last = packed([message])
        assert all(reader.feed(bytes([byte])) == [] and reader.partial for byte in most)
        assert plain(reader.feed(bytes([last]))) == [message]
        assert not reader.partial


@given(streams())
def test_payloads_stay_as_they_are(stream):
    """A payload is valid after later bytes have been fed: no buffer is used again beneath it."""
    messages, pieces = stream
    reader = Reader()
    kept = [message for piece in pieces for message in reader.feed(piece)]
    assert plain(kept) == messages


@given(MESSAGES, st.binary(max_size=HEAD.size - 1))
def test_a_message_that_has_only_begun(messages, begun):
    """What is left of a message that has not ended is known to be there."""
    reader = Reader()
    assert plain(reader.feed(packed(messages) + begun)) == messages
    assert reader.partial == bool(begun)


def test_nothing_fed_is_nothing_found():
    """An empty read changes nothing."""
    reader = Reader()
    assert reader.feed(b"") == []
    assert reader.feed(b"\1") == []
    assert reader.feed(b"") == []
    assert reader.partial


def test_kinds_are_distinct():
    """Each kind has a number of its own that fits in the head's byte."""
    kinds = [wire.TASK, wire.STOP, wire.UP, wire.ACK, wire.DONE, wire.FAILED, wire.TRIMMED]
    assert len(set(kinds)) == len(kinds)
    assert all(0 < kind < 256 for kind in kinds)


@pytest.mark.parametrize("value", [None, (True, "x"), {"a": [1, 2]}, b"x" * 100_000])
def test_a_pickled_payload(value):
    """A payload is unpickled where it lies, without a copy."""
    body = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    [(kind, job, number, payload)] = Reader().feed(wire.head(wire.DONE, len(body), 7, 1.5) + body)
    assert (kind, job, number) == (wire.DONE, 7, 1.5)
    assert wire.loads(payload) == value


def test_a_large_message_is_collected_in_little_more_than_its_size():
    """20 MB in reads of 1 MB take little more than twice that: no fragment costs a copy of all before."""
    size, step = 20_000_000, 1_000_000
    stream = wire.head(wire.DONE, size, 1, 0.0) + bytes(size)
    pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
    del stream
    reader = Reader()
    tracemalloc.start()
    try:
        messages = [message for piece in pieces for message in reader.feed(piece)]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(messages) == 1
    assert len(messages[0][3]) == size
    assert peak_bytes < 2.5 * size
