"""As `fragmentation`, with jemalloc in place of the C library's malloc, for worker and children.

jemalloc has objects of 700 bytes in runs of 16, three pages each, and can give back a run only if all of it
is free. Each object that is kept by itself holds one: 12 KB, so 37 MB for 3,000, where glibc holds a page for
each. In the second row what is kept is what was made last, one next to the other; it has no bound.
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
        yield fragmentation.fragmented(url, options, name, bound=True, LD_PRELOAD=preload)
        name = "the same, kept are the last 1 %"
        yield fragmentation.fragmented(url, options, name, scattered=False, LD_PRELOAD=preload)


if __name__ == "__main__":
    row.main(rows, __doc__)
