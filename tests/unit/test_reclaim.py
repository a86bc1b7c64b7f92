"""What of a cgroup's charge is used: what the kernel can take back is room, and all else is not."""

from __future__ import annotations

import pytest
from harness import trees
from harness.trees import GB, MB
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool import reclaim
from memsafe_pool.reclaim import Use, find

LIMIT = 1024 * MB

#: Recorded (Linux 6.18, version 1, 512 MiB): a process has written 157 MiB of a file; none of it is on disk.
WRITTEN_V1 = b"""\
cache 164626432
rss 8069120
rss_huge 0
shmem 0
mapped_file 0
dirty 164626432
writeback 0
workingset_refault_anon 0
workingset_refault_file 0
swap 0
swapcached 0
pgpgin 2168
pgpgout 41
pgfault 2676
pgmajfault 0
inactive_anon 8065024
active_anon 4096
inactive_file 164626432
active_file 0
unevictable 0
hierarchical_memory_limit 536870912
hierarchical_memsw_limit 9223372036854771712
total_cache 164626432
total_rss 8069120
total_rss_huge 0
total_shmem 0
total_mapped_file 0
total_dirty 164626432
total_writeback 0
total_workingset_refault_anon 0
total_workingset_refault_file 0
total_swap 0
total_swapcached 0
total_pgpgin 2168
total_pgpgout 41
total_pgfault 2676
total_pgmajfault 0
total_inactive_anon 8065024
total_active_anon 4096
total_inactive_file 164626432
total_active_file 0
total_unevictable 0
"""


def stat(version, **numbers):
    """What ``memory.stat`` holds of a container with so many bytes of each."""
    make = {1: trees.v1, 2: trees.v2}[version]
    return make("", **numbers)["/memory.stat"].encode()


@pytest.mark.parametrize("version", [1, 2])
def test_files_are_room(version):
    """However often they were read, whoever has them mapped."""
    for inactive, active in [(700, 0), (0, 700), (300, 400)]:
        text = stat(version, inactive=inactive * MB, active=active * MB)
        assert find(version, LIMIT, 760 * MB, text) == Use(60 * MB)


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_on_other_lists_is_used(version):
    """Memory of processes, tmpfs, shared memory and locked pages: whatever is no page of a file."""
    assert find(version, LIMIT, 400 * MB, stat(version, inactive=50 * MB)).used == 350 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_pages_to_be_written_are_used_and_uncertain(version):
    """Both those that wait and those under way; no more than a sixteenth of the limit."""
    text = stat(version, inactive=300 * MB, unwritten=50 * MB)
    assert find(version, LIMIT, 360 * MB, text) == Use(110 * MB, 50 * MB)
    text = stat(version, inactive=900 * MB, unwritten=800 * MB)
    assert find(version, LIMIT, 960 * MB, text) == Use((60 + 64) * MB, 64 * MB)


@pytest.mark.parametrize("version", [1, 2])
def test_more_to_be_written_than_there_are_files(version):
    """What is swapped out is under writeback, too, and is no room that files would leave."""
    text = stat(version, inactive=10 * MB, unwritten=80 * MB)
    assert find(version, LIMIT, 100 * MB, text) == Use(100 * MB, 10 * MB)


def test_slab_in_version_2():
    """What can be freed of it is room, what cannot is not."""
    text = stat(2, inactive=100 * MB, slab=330 * MB)
    assert find(2, LIMIT, 500 * MB, text) == Use(70 * MB)


@pytest.mark.parametrize(("kernel", "used"), [(5, 60), (12, 60), (330, 60)])
def test_the_kernels_memory_in_version_1(kernel, used):
    """A little counts as used, as stacks and page tables are; what is more are dentries and the like."""
    text = stat(1, inactive=100 * MB, kernel=kernel * MB)
    found = find(1, LIMIT, (100 + used + kernel) * MB, text, kernel * MB)
    counted = min(kernel * MB, (8 * MB) + used * MB // 16)
    assert found == Use(used * MB + counted, counted)


def test_page_tables_grow_with_what_they_map():
    """Nearly full of processes, and with 28 MB of the kernel for them: all of it counts."""
    assert find(1, LIMIT, 900 * MB, stat(1, inactive=0), 60 * MB).used == 900 * MB


def test_recorded():
    """8 MiB of a process and 4 MiB of the kernel; a sixteenth of the limit of what is to be written."""
    found = find(1, 512 * MB, 177434624, WRITTEN_V1, 4620288)
    assert found == Use(177434624 - 164626432 + 32 * MB, 32 * MB + 4620288)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["active_file", "inactive_file"])
def test_a_file_that_is_something_else(version, name):
    """Without the lists of files nothing is known."""
    prefix = "total_" * (version == 1)
    text = stat(version, inactive=5 * MB).decode().replace(f"\n{prefix}{name} ", f"\n{prefix}{name}s ")
    assert find(version, LIMIT, 100 * MB, text.encode()) is None
    assert find(version, LIMIT, 100 * MB, b"") is None


def test_an_old_kernel():
    """Nothing of what is to be written, and of slab, before Linux 4.6: there are files all the same."""
    assert find(2, LIMIT, 100 * MB, b"active_file 1048576\ninactive_file 2097152\n") == Use(97 * MB)
    assert find(1, LIMIT, 100 * MB, b"total_active_file 1\ntotal_inactive_file 0\n") == Use(100 * MB - 1)


sizes = st.integers(0, 2 * GB)


@given(st.sampled_from([1, 2]), st.tuples(*[sizes] * 6))
def test_numbers_that_make_no_sense_together(version, six):
    """The kernel gathers them from all cores: use is never less than nothing, nor more than is charged."""
    limit, charged, inactive, active, unwritten, kernel = six
    numbers = {1: {}, 2: {"slab": kernel}}[version]
    text = stat(version, inactive=inactive, active=active, unwritten=unwritten, **numbers)
    use = find(version, limit, charged, text, kernel)
    assert 0 <= use.uncertain <= use.used <= charged
    assert use.uncertain <= limit // reclaim.WRITTEN_PART + reclaim.KERNEL_BYTES + charged // 16
