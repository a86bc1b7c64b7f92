"""What would have happened: traces, and the machine they are replayed on."""

from __future__ import annotations

import io

import pytest

from memsafe_pool.machine import Machine, Terms, Work
from memsafe_pool.simulate import TraceError, main, read, replay, table

MIB = 1 << 20

HEAD = "start,name,peak,seconds"


def terms(limit=1024, bound=20, **options):
    return Terms(limit * MIB, bound, **options)


def tasks(number, peak, seconds=0.2, *, at=0.0, name="any", **options):
    """So many tasks of so many MiB at the same time."""
    curve = [(0.0, 0), (seconds / 2, peak * MIB), (seconds, peak * MIB), (seconds, 0)]
    return [(at, Work(name, curve, **options)) for _ in range(number)]


# Traces


@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD}\n0.5,report,50MB,2\n",
        "name, duration, arrival, peak\n\nreport, 2, 0.5, 50000000\n",
        '{"start": 0.5, "name": "report", "peak": 5e7, "seconds": 2}\n\n',
        '{"arrival": "0.5", "name": "report", "peak": "50MB", "duration": 2, "reserved": null}',
    ],
)
def test_ways_to_write_the_same(text):
    """CSV and JSON lines, two names for times, bytes and sizes."""
    [(at, work)] = read(io.StringIO(text))
    assert (at, work.name, work.peak, work.seconds) == (0.5, "report", 50_000_000, 2.0)
    assert work.declared is work.label is None


def test_what_may_be_added():
    """What is declared, what is kept, how fast it gets to its peak, what else its size is known by."""
    [(_, work)] = read([f"{HEAD},reserved,kept,rise,key", "0,report,50MB,2,60MB,1MB,0.1,big"])
    assert work.declared == 60_000_000
    assert work.curve == ((0.0, 0), (0.1, 50_000_000), (2.0, 50_000_000), (2.0, 1_000_000))
    assert work.label == "big"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "there is no task in it"),
        (HEAD, "there is no task in it"),
        (f"{HEAD}\n0,a,1", "line 2: there is no 'seconds'"),
        (f"{HEAD}\n0,a,1,2,3", "line 2: 5 values, but there are 4 names at the top"),
        (f"{HEAD}\n\n0,a,many,2", "line 3: peak is 'many', and must be bytes or a size such as '50MB'"),
        (f"{HEAD}\n-1,a,1,2", "line 2: start is '-1', and must be a number of seconds"),
        (f"{HEAD}\n0,a,1,nan", "line 2: seconds is 'nan', and must be a number of seconds"),
        (f"{HEAD},rise\n0,a,1,2,3", "line 2: rise is more than seconds"),
        (f"{HEAD},kept\n0,a,1,2,3", "line 2: kept is more than peak"),
        (f"{HEAD},colour\n0,a,1,2,red", "line 2: 'colour' is not known"),
        ('{"start": 0}\n', "line 1: there is no 'name'"),
        ('{"start": 0', "line 1: not valid JSON"),
        ('{"start": 0}\n[1]', "line 1: there is no 'name'"),
        ('{"start": 0, "name": "a", "peak": 1, "seconds": 1}\n[1]', "line 2: not a JSON object"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text, complaint):
    """In one sentence."""
    with pytest.raises(TraceError) as caught:
        read(io.StringIO(text))
    assert complaint in str(caught.value)


# The machine


def test_what_fits_is_not_disturbed():
    """All at once, as if there were no limit."""
    machine = replay(tasks(10, 10), terms(), warm=True)
    assert [work.outcome for work in machine.works] == ["done"] * 10
    assert machine.now == pytest.approx(0.3, abs=0.01)  # the first two children are started before the others
    assert machine.counts.peak == (64 + 10 * (12 + 10)) * MIB
    assert not machine.counts.paused
    assert not any(work.held for work in machine.works)


def test_what_does_not_fit_waits():
    """And is never more than the budget."""
    machine = replay(tasks(40, 100, declared=100 * MIB), terms(limit=512))
    assert [work.outcome for work in machine.works] == ["done"] * 40
    assert machine.counts.peak <= machine.budget.bytes
    assert any(work.held for work in machine.works)
    assert not machine.counts.killed


def test_one_that_can_never_fit_fails_and_the_others_do_not():
    """After its tries; the kernel has nothing to do."""
    machine = replay([*tasks(20, 30), *tasks(1, 2048, 2.0, name="giant"), *tasks(20, 30)], terms())
    assert {work.name for work in machine.works if work.outcome == "failed"} == {"giant"}
    assert machine.counts.killed >= 1
    assert machine.counts.kernel_kills == 0


def test_without_pauses_the_kernel_kills():
    """What is unknown and large is too fast for everything else."""
    crowd = [*tasks(10, 1, 0.05, name="small"), *tasks(10, 300, 0.5, at=2.0, name="large")]
    assert replay(crowd, terms()).counts.kernel_kills == 0
    crowd = [*tasks(10, 1, 0.05), *tasks(10, 300, 0.5, at=2.0)]
    assert replay(crowd, terms(pause=False)).counts.kernel_kills > 0


def test_many_that_grow_slowly_do_not_fill_the_machine():
    """Each by so little that it is not seen to grow by itself."""
    crowd = [(0.0, Work(f"slow{number}", [(0.0, 0), (10.0, 30 * MIB), (10.0, 0)])) for number in range(10)]
    machine = replay(crowd, terms(limit=256, child=4 * MIB))
    assert machine.counts.kernel_kills == 0
    assert all(work.outcome for work in machine.works)


def test_children_that_keep_memory_are_replaced():
    """So that nothing is killed, however many tasks there are."""
    leaky = [(0.0, Work("leaky", [(0.0, 0), (0.01, 2 * MIB), (0.02, 2 * MIB)])) for _ in range(500)]
    machine = replay(leaky, terms(limit=600))
    assert all(work.outcome == "done" for work in machine.works)
    assert machine.counts.retired > 0
    assert machine.counts.kernel_kills == 0


def test_a_lower_limit_is_followed():
    """Within two seconds, without losing anything."""
    machine = Machine(terms())
    for at, work in tasks(40, 50, 1.0):
        machine.arrive(work, at)
    machine.run(until=0.02)
    machine.limit = 512 * MIB
    machine.run()
    assert machine.budget.limit == 512 * MIB
    assert all(work.outcome == "done" for work in machine.works)
    assert machine.counts.kernel_kills == 0


# The command


def test_the_command_prints_a_table(tmp_path, capsys):
    """One line for each number."""
    trace = tmp_path / "trace.csv"
    trace.write_text(HEAD + "\n" + "0,small,20MB,0.2\n" * 30 + "0,large,280MB,0.5\n" * 3)
    assert main([str(trace), "--limit", "1GiB", "-c", "20"]) == 0
    out = capsys.readouterr().out
    assert "limit              1024 MiB\n" in out
    assert "tasks done         33 of 33\n" in out
    assert "kernel kills       0\n" in out
    assert "longest wait" in out


def test_the_table_names_what_has_failed():
    """And tells when the worker itself did not fit."""
    assert "tasks failed       1 (giant)" in table(replay(tasks(1, 2048, name="giant"), terms()))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.csv", "--limit", "1GiB"], "nowhere.csv: No such file or directory"),
        (["-", "--limit", "much"], "'much' is no size such as '1GiB'"),
        (["-", "--limit", "1GiB", "-c", "0"], "-c and --cores must be at least 1"),
        (["-", "--limit", "32MiB"], "the worker and one child do not fit under a limit of 32 MiB"),
        (["-", "--limit", "1GiB", "--budget", "2.0"], "it must be a size"),
        (["-", "--limit", "1GiB"], "-: there is no task in it"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, complaint, capsys, monkeypatch):
    """With the exit status of a wrong command line."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
