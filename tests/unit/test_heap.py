"""What of the C library's heap is in memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from memsafe_pool import heap, native

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or native.allocator() != "glibc", reason="the heap of glibc, as Linux shows it"
)

#: A heap of 200 MB, of which little is in use; then what is free goes back, from the middle as well.
SCRIPT = """
import os
from memsafe_pool import heap, native

def compare():
    resident, pages = heap.look(), heap.pages()
    print(resident >> 20, abs(resident - pages.resident) >> 20, heap.most_grown() >> 20, flush=True)

blocks = [bytes(1000) for _ in range(200_000)]
kept = blocks[::100]
del blocks
compare()
native.release_heap()
compare()
if os.fork() == 0:
    more = [bytes(1000) for _ in range(300_000)]
    compare()
    os._exit(0)
os.wait()
"""


def test_it_is_what_smaps_says():
    """Before and after a trim, and in a child whose heap is two mappings; what is missing may grow back."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    full, trimmed, more = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert full[0] > 200
    assert full[1] == trimmed[1] == more[1] == 0
    assert full[2] == 0
    assert trimmed[0] < 50
    assert trimmed[2] > 150
    assert more[0] > 300


def test_where_the_kernel_does_not_say(monkeypatch):
    """Nothing is known, and that is no error."""
    monkeypatch.setattr(heap, "_start", lambda: 1 << 46)  # nothing is mapped there
    monkeypatch.setattr(heap, "_end", lambda: (1 << 46) + 10 * os.sysconf("SC_PAGESIZE"))
    monkeypatch.setattr(heap, "_last", [])
    assert heap.look() is None
    assert heap.most_grown() is None
