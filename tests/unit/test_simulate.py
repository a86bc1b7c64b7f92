"""What would have happened: traces, and the machine they are replayed on."""

from __future__ import annotations

import io
import json

import pytest

from memsafe_pool import cores
from memsafe_pool.machine import Machine, Terms, Work
from memsafe_pool.recycle import Rules
from memsafe_pool.simulate import TraceError, _parser, main, read, replay, table

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
        "start,peak,end,name\n0.5,50MB,2.5,report\n",
        '{"start": 0.5, "name": "report", "peak": 5e7, "end": 2.5, "late": true}',
    ],
)
def test_ways_to_write_the_same(text):
    """CSV and JSON lines, two names for times, its time or its end, bytes and sizes."""
    [(at, work)] = read(io.StringIO(text))
    assert (at, work.name, work.peak, work.seconds) == (0.5, "report", 50_000_000, 2.0)
    assert work.declared is work.label is None
    assert work.redeliverable


def test_what_may_be_added():
    """What is declared or kept, when it is at its peak, what else tells its size, how it is acknowledged."""
    [(_, work)] = read([f"{HEAD},reserved,kept,rise,key,late", "0,report,50MB,2,60MB,1MB,0.1,big,no"])
    assert work.declared == 60_000_000
    assert work.curve == ((0.0, 0), (0.1, 50_000_000), (2.0, 50_000_000), (2.0, 1_000_000))
    assert work.label == "big"
    assert not work.redeliverable


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
        (f"{HEAD}\n0,a,1,1e300", "line 2: it takes more than a year"),
        (f"{HEAD}\n5,a,1,1\n1e11,a,1,1", "line 3: start is more than a year from that of another task"),
        ("start,name,peak,end\n5,a,1,4", "line 2: end is before start"),
        ("start,name,peak,end\n5,a,1,late", "line 2: end is 'late', and must be a number of seconds"),
        ("name,peak,end\na,1,4", "line 2: there is no 'start'"),
        (f"{HEAD},end\n0,a,1,2,2", "line 2: there are both 'seconds' and 'end'"),
        (f"{HEAD},late\n0,a,1,2,perhaps", "line 2: late is 'perhaps', and must be yes or no"),
        (f"{HEAD},rise\n0,a,1,2,3", "line 2: rise is more than seconds"),
        (f"{HEAD},kept\n0,a,1,2,3", "line 2: kept is more than peak"),
        (f"{HEAD},colour\n0,a,1,2,red", "line 2: 'colour' is not known"),
        ('{"start": 0}\n', "line 1: there is no 'name'"),
        ('{"start": 0', "line 1: not valid JSON"),
        ('{"start": 0}\n[1]', "line 1: there is no 'name'"),
        ('{"start": 0, "name": "a", "peak": 1, "seconds": 1}\n[1]', "line 2: not a JSON object"),
        ('{"start": ' + "[" * 100_000, "line 1: not valid JSON"),
        (HEAD + "\n0,a,1," + "2" * 200_000, "line 2: not valid CSV"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text, complaint):
    """In one sentence."""
    with pytest.raises(TraceError) as caught:
        read(io.StringIO(text))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("start", "peak", "seconds", "kept", "late") for value in ([1], {"a": 1})]
    + [("name", ["a"]), ("key", {}), ("seconds", True), ("start", 10**400), ("end", [])],
)
def test_a_value_of_another_kind_is_named(name, value):
    """JSON has lists, objects and numbers of any length."""
    row = {"start": 0, "name": "a", "peak": 1, "seconds": 1}
    if name == "end":
        del row["seconds"]
    with pytest.raises(TraceError, match=f"line 1: {name} is .*, and must be "):
        read([json.dumps({**row, name: value})])


def test_any_clock_will_do():
    """Seconds since 1970 take no longer to replay than seconds since the first task."""
    text = f"{HEAD}\n{{0}}.25,a,1MB,2\n{{0}}.5,b,1MB,2"
    machines = [replay(read(io.StringIO(text.format(clock))), terms()) for clock in (0, 1_700_000_000)]
    assert machines[0].now == pytest.approx(machines[1].now)
    assert table(machines[0]) == table(machines[1])


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


def test_what_is_acknowledged_early_is_not_run_again():
    """Nobody has said that it may be."""
    [work] = replay(tasks(1, 2048, 2.0, redeliverable=False), terms()).works
    assert (work.outcome, work.runs) == ("failed", 1)


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


@pytest.mark.parametrize("seen", [True, False])
def test_files_in_memory_do_not_fill_the_machine(seen):
    """Each task writes some, and deletes it in the end; nobody is seen to have them."""
    spools = [
        (0.0, Work("spool", [(0.0, 0), (0.2, 80 * MIB), (0.4, 80 * MIB), (0.4, 0)], unseen=True))
        for _ in range(12)
    ]
    others = tasks(24, 70, at=0.0, name="other") if seen else []
    machine = replay(others[:8] + spools + others[8:], terms(400))
    assert [work.outcome for work in machine.works] == ["done"] * len(machine.works)
    assert (machine.counts.kernel_kills, machine.counts.killed) == (0, 0)


def test_children_that_keep_memory_are_replaced():
    """So that nothing is killed, however many tasks there are."""
    leaky = [(0.0, Work("leaky", [(0.0, 0), (0.01, 2 * MIB), (0.02, 2 * MIB)])) for _ in range(500)]
    machine = replay(leaky, terms(limit=600))
    assert all(work.outcome == "done" for work in machine.works)
    assert machine.counts.retired > 0
    assert machine.counts.kernel_kills == 0


def test_replacements_start_where_there_is_room():
    """What other children that are starting are still going to take is not there for them."""
    machine = Machine(
        terms(256, 5, base=80 * MIB, child=30 * MIB, start_seconds=0.3, others={"rules": Rules(max_age=0.5)})
    )
    machine.room.child_bytes = 30 * MIB
    for number in range(100):
        [(at, work)] = tasks(1, 1, 0.2, at=number / 10, declared=MIB)
        machine.arrive(work, at)
    machine.run()
    assert machine.counts.peak <= machine.budget.bytes


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


#: Two at once, and two more after a time in which children go; ten that leave something behind, one after the
#: other; two that do not fit together, without a word of it; one that fits nowhere.
APART = ["0,a,20MB,2"] * 2 + ["100,a,20MB,2"] * 2
LEAKY = [f"{number},leaky,20MB,0.5,10MB" for number in range(10)]
LARGE = ["0,a,600MB,3", "0,b,600MB,3"]
GIANT = ["0,giant,2GB,2"]


@pytest.mark.parametrize(
    ("rows", "setting", "change"),
    [
        (APART, ["--min-children", "2"], ("children started", "4", "2")),
        (APART, ["--idle-timeout", "none"], ("children started", "4", "2")),
        (LEAKY, ["--max-child-growth", "35MB"], ("children started", "1", "3")),
        (LEAKY, ["--max-child-age", "4"], ("children started", "1", "3")),
        (LARGE, ["--max-pause", "1"], ("tasks killed", "0 times", "1 times")),
        (GIANT, ["--tries", "0"], ("tasks run again", "1 times", "0 times")),
        (GIANT, ["--budget", "256MiB"], ("budget", "922 MiB", "256 MiB")),
    ],
)
def test_settings_of_the_pool(rows, setting, change, tmp_path, capsys):
    """Each changes what happens."""
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["start,name,peak,seconds,kept", *rows]))
    found = []
    for options in [], setting:
        assert main([str(trace), "--limit", "1GiB", "-c", "4", *options]) == 0
        lines = {line[:18].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}
        found.append(lines[change[0]])
    assert found == list(change[1:])


def test_it_has_the_cores_of_this_process():
    """Those it may run on, as the pool counts them."""
    given = _parser().parse_args(["-", "--limit", "1GiB"])
    assert given.cores == given.concurrency == cores.count() >= 1


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
        (["-", "--limit", "1GiB", "--start", "nan"], "'nan': it must be a number of seconds above 0"),
        (["-", "--limit", "1GiB", "--start", "inf"], "'inf': it must be a number of seconds above 0"),
        (["-", "--limit", "1GiB", "--start", "1e9"], "--start must be at most 3600 seconds"),
        (["-", "--limit", "1GiB", "--overtake", "nan"], "'nan': it must be a number of seconds above 0"),
        (["-", "--limit", "1GiB", "--tries", "-1"], "'-1': it must be a whole number, 0 or more"),
        (["-", "--limit", "1GiB", "--max-child-age", "inf"], "'inf': it must be a number of seconds, 0 or"),
        (["-", "--limit", "1GiB", "--max-child-growth", "0"], "'0': it must be a size of more than 0"),
        (["-", "--limit", "1GiB", "-c", "4", "--min-children", "5"], "must be at most -c, which is 4"),
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
