"""As `fragmentation`, with jemalloc in place of the C library's malloc, for worker and children.

jemalloc has objects of 700 bytes in runs of 16, three pages each, and can give back a run only if all of it
is free. In the first row what is kept is forgotten at the task's end. In the second it is kept until the next
task, and each object holds a run: 12 KB, so 37 MB for 3,000, where glibc holds a page for each; no bound.
"""

from __future__ import annotations

import ctypes.util
import os
from typing import TYPE_CHECKING

import broker
import fragmentation
import row

if TYPE_CHECKING:
    from collections.abc import Iterator


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run prefork and our pool in turn; nothing where there is no jemalloc."""
    name = "fragmentation, with jemalloc"
    library = ctypes.util.find_library("jemalloc")
    if library is None:
        yield row.Row(name, "", "not run: libjemalloc is not installed")
        return
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    with broker.redis_url() as url:
        yield fragmentation.fragmented(url, options, name, most=0, bound=True, LD_PRELOAD=preload)
        name = "the same, kept until the next task"
        yield fragmentation.fragmented(url, options, name, LD_PRELOAD=preload)


if __name__ == "__main__":
    row.main(rows, __doc__)
