"""What a task returns or raises is what its caller gets; canvas, retries and processes started by tasks."""

from __future__ import annotations

import sys

import errors
import pytest
from billiard.exceptions import WorkerLostError
from celery import chain, chord, group
from kombu.exceptions import EncodeError

MIB = 1024 * 1024

#: Exceptions that cannot be pickled, or not be rebuilt from what was pickled: name, arguments.
CANNOT_TRAVEL = [
    ("TwoArguments", (7, "no"), {}),
    ("KeywordOnly", (), {"code": 7}),
    ("Unpicklable", ("locked",), {}),
    ("Breaks", (), {}),
]


def fails_alone(worker, name, args, kwargs):
    """Check that the exception reaches the caller, itself or by name, and that work goes on."""
    result = worker.call("proj.fail", name, *args, kwargs=kwargs)
    value = worker.get(result, propagate=False)
    assert result.state == "FAILURE"
    assert isinstance(value, getattr(errors, name)) or name in f"{type(value).__name__} {value!r}"
    assert worker.run("proj.add", 1, 1) == 2


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker(start_method=start_method)


def test_the_result_comes_back(worker):
    """A task's return value is what the caller gets."""
    assert worker.run("proj.add", 2, 3) == 5


def test_the_task_runs_in_a_child(worker):
    """A task runs in a child of the worker, which ``stats`` lists."""
    pid = worker.run("proj.pid")
    assert pid != worker.pid
    assert pid in worker.children()


def test_a_failure_comes_back(worker):
    """A built-in exception is raised again for the caller, with the child's traceback at hand."""
    result = worker.call("proj.fail", "ValueError", "no such thing")
    with pytest.raises(ValueError, match="no such thing"):
        worker.get(result)
    assert "raise kind(*args, **kwargs)" in result.traceback


@pytest.mark.parametrize(("name", "args", "kwargs"), CANNOT_TRAVEL)
def test_a_failure_that_cannot_travel_is_a_failure_all_the_same(worker, name, args, kwargs):
    """An exception that cannot be pickled or rebuilt still ends its task as failed, and harms nobody else."""
    fails_alone(worker, name, args, kwargs)


def test_a_result_that_cannot_be_encoded_fails_its_task(worker):
    """A return value the result serializer refuses makes the task fail, with the reason."""
    with pytest.raises(EncodeError):
        worker.run("proj.lock")
    assert worker.run("proj.add", 1, 1) == 2


@pytest.mark.needs_celery("5.7")
def test_a_result_nobody_wants_need_not_be_encoded(worker):
    """With ``ignore_result`` a task may return anything: it does not leave the child."""
    mark = worker.folder / "ran"
    worker.call("proj.lock_ignored", str(mark))
    worker.until(mark.exists, "the task to run")
    worker.wait_for_log(r"Task proj\.lock_ignored\[.*\] succeeded")


def test_50_mb_arguments_arrive(worker):
    """An argument of 50 MB gets through the broker and the pipe to the child."""
    assert worker.run("proj.length", "x" * (50 * MIB)) == 50 * MIB


def test_a_50_mb_result_comes_back(worker):
    """A result of 50 MB gets through."""
    assert worker.run("proj.text", 50 * MIB) == "x" * (50 * MIB)


def test_a_50_mb_exception_comes_back(worker):
    """An exception of 50 MB passes the pipe from the child to the worker, and the pool goes on."""
    with pytest.raises(errors.Big) as caught:
        worker.run("proj.fail_big", 50 * MIB)
    assert len(caught.value.args[0]) == 50 * MIB
    assert worker.run("proj.add", 1, 1) == 2


def test_many_small_results_while_a_big_one_is_on_its_way(worker):
    """Big arguments to one child do not mix with, or lose, small tasks for another."""
    big = worker.call("proj.length", "x" * (20 * MIB))
    small = [worker.call("proj.add", number, number) for number in range(50)]
    assert [worker.get(result) for result in small] == [2 * number for number in range(50)]
    assert worker.get(big) == 20 * MIB


@pytest.mark.stock_differs("its caller waits for ever", run=False, before="5.7")
@pytest.mark.parametrize("code", [0, 3])
def test_system_exit_in_a_task_fails_it(worker, code):
    """A task that calls ``sys.exit`` fails, whatever the code; the pool goes on."""
    result = worker.call("proj.leave", code)
    with pytest.raises(WorkerLostError):
        worker.get(result)
    assert result.state == "FAILURE"
    assert [worker.run("proj.add", 1, number) for number in range(4)] == [1, 2, 3, 4]


def test_a_chain_a_group_and_a_chord(worker):
    """Canvas works through the pool."""
    add, total = worker.app.signature("proj.add"), worker.app.signature("proj.total")
    assert worker.get(chain(add.clone((1, 2)), add.clone((3,)), add.clone((4,)))()) == 10
    numbers = group([add.clone((n, n)) for n in range(10)], app=worker.app).apply_async()
    assert [worker.get(result) for result in numbers.results] == [2 * n for n in range(10)]
    numbers = chord([add.clone((n, n)) for n in range(10)], app=worker.app)(total)
    assert worker.get(numbers) == 90


def test_a_task_retries_itself(worker):
    """``self.retry`` and ``autoretry_for`` run the task again."""
    assert worker.run("proj.third_time") == 2
    assert worker.run("proj.third_time_by_itself") == 2


def test_retries_have_an_end(worker):
    """After ``max_retries`` the caller gets what the last run raised."""
    with pytest.raises(ValueError, match="run 2"):
        worker.run("proj.never")


def test_a_task_starts_a_program(worker):
    """A task can run a program and gets its real exit status and output, again and again."""
    program = [sys.executable, "-c", "print('hello'); raise SystemExit(7)"]
    for _ in range(3):
        assert worker.run("proj.run", *program) == [7, "hello\n"]


@pytest.fixture(scope="module")
def pickling_worker(start_module_worker, start_method):
    config = {
        "task_serializer": "pickle",
        "result_serializer": "pickle",
        "accept_content": ["pickle", "json"],
    }
    return start_module_worker(start_method=start_method, config=config, env={"C_FORCE_ROOT": "1"})


def test_pickled_results_and_failures_keep_their_type(pickling_worker):
    """With the pickle serializer, what Python can pickle comes back as it was."""
    assert pickling_worker.run("proj.echo", {1, (2, b"3")}) == {1, (2, b"3")}
    with pytest.raises(ValueError, match="no such thing"):
        pickling_worker.run("proj.fail", "ValueError", "no such thing")


@pytest.mark.parametrize(("name", "args", "kwargs"), CANNOT_TRAVEL)
def test_what_cannot_be_pickled_fails_its_task_only(pickling_worker, name, args, kwargs):
    """With the pickle serializer, an exception that cannot be pickled or rebuilt arrives as a failure."""
    fails_alone(pickling_worker, name, args, kwargs)


def test_a_result_that_cannot_be_pickled_fails_its_task(pickling_worker):
    """A return value that cannot be pickled makes the task fail, and nothing else."""
    with pytest.raises(Exception, match=r"(?i)pickle"):
        pickling_worker.run("proj.lock")
    assert pickling_worker.run("proj.add", 1, 1) == 2
