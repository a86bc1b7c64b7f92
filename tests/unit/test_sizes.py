"""What is said of a call, by its header, its task and its arguments; messages are Celery's own."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import kombu
import pytest
from celery import Celery
from celery.worker.request import Request

from memsafe_pool.job import Job
from memsafe_pool.reservations import ENOUGH, STEADY, UNKNOWN, Estimate
from memsafe_pool.sizes import MOST_COMPLAINTS, MOST_LABEL, MOST_SHOWN, Sizes

MIB = 1 << 20

LIMITS = ("memsafe_soft_limit", "memsafe_hard_limit")


@pytest.fixture
def app():
    made = Celery("sizes", broker="memory://", set_as_current=False)
    yield made
    made.close()


@pytest.fixture
def sizes(app):
    return Sizes(app)


def declare(app, name="proj.work", *, method=None, **options):
    """A task with these options; ``method``: what its base class has as ``memsafe_key``."""
    if method is not None:
        options["base"] = type("Base", (app.Task,), {"memsafe_key": method})

    def work(*args, **kwargs):
        pass

    return app.task(shared=False, name=name, **options)(work)


def call(app, task, *args, headers=None, queue="celery", **kwargs):
    """The job that a worker makes of a call, whose message has been through a broker in memory."""
    with app.connection_for_write() as connection:
        task.apply_async(args, kwargs, headers=headers, queue=queue, connection=connection)
        message = kombu.Queue(queue, channel=connection.default_channel).get(no_ack=True)
    jobs = []

    def apply_async(function, args, **_):
        jobs.append(Job(function, args, {}))
        return jobs[0]

    task = app.tasks[task.name]
    Request(message, app=app, task=task).execute_using_pool(SimpleNamespace(apply_async=apply_async))
    return jobs[0]


def sized(sizes, app, task, *args, **options):
    """A job of which is known what was said of it."""
    job = call(app, task, *args, **options)
    sizes.size_up(job)
    return job


def certain(size):
    return Estimate(size, size, known=True)


# What it needs


def test_who_is_asked_first(app, sizes):
    """The header, the task, what was learned, in this order; else nothing is known."""
    silent = declare(app)
    job = sized(sizes, app, silent)
    assert job.estimate is UNKNOWN
    assert (job.soft_limit, job.hard_limit) == (None, None)
    sizes.learn(job, 10 * MIB)
    assert sized(sizes, app, silent).estimate.reserved == pytest.approx(11 * MIB, abs=1)
    assert sized(sizes, app, silent, headers={"memsafe_memory": "2Mi"}).estimate == certain(2 * MIB)


def test_the_call_is_asked_before_the_task(app, sizes):
    """For each of the three, and whatever the others are."""
    said = {"memsafe_memory": "3MiB", "memsafe_soft_limit": "4MiB", "memsafe_hard_limit": "5MiB"}
    task = declare(app, **said)
    job = sized(sizes, app, task)
    assert (job.estimate, job.soft_limit, job.hard_limit) == (certain(3 * MIB), 4 * MIB, 5 * MIB)
    job = sized(sizes, app, task, headers={"memsafe_memory": 7})
    assert (job.estimate, job.soft_limit, job.hard_limit) == (certain(7), 4 * MIB, 5 * MIB)
    job = sized(sizes, app, task, headers={"memsafe_soft_limit": 8, "memsafe_hard_limit": 9.9})
    assert (job.estimate, job.soft_limit, job.hard_limit) == (certain(3 * MIB), 8, 9)


def test_nothing_is_a_size(app, sizes, caplog):
    """Nothing may be needed, whatever the task declares and its like has needed."""
    task = declare(app, memsafe_memory="150MiB")
    assert sized(sizes, app, task, headers={"memsafe_memory": 0}).estimate == certain(0)
    job = sized(sizes, app, declare(app, "proj.nothing", memsafe_memory=0))
    sizes.learn(job, 100 * MIB)
    sizes.size_up(job)
    assert job.estimate == certain(0)
    assert not caplog.messages


# What it may take


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 0.5, -3.5, "0", "0 MiB", "-1", "much", True, [5]])
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_nothing_is_none(app, sizes, caplog, name, wrong):
    """A limit that no task could keep is a warning, and is left out; so the task's own holds for the call."""
    accepted = "it must be a number of bytes above 0, or a size such as '1.5GiB'."
    job = sized(sizes, app, declare(app, **{name: wrong}))
    assert (job.soft_limit, job.hard_limit) == (None, None)
    assert caplog.messages == [
        f"{name}={wrong!r} of the task proj.work is not valid, and is left out: {accepted}"
    ]
    caplog.clear()
    task = declare(app, "proj.limited", **{name: "1 b"})
    for _ in range(2):
        job = sized(sizes, app, task, headers={name: wrong})
        assert {job.soft_limit, job.hard_limit} == {None, 1}
    assert caplog.messages == [
        f"{name}={wrong!r} of the header of proj.limited is not valid, and is left out: {accepted}"
    ]


# What it is like


def label(sizes, app, task, *args, **options):
    return sized(sizes, app, task, *args, **options).label


class Formats:
    """Something that has functions to ask."""

    def of(self, path):
        return path.rpartition(".")[2]


def format_of(path, **_):
    return path.rpartition(".")[2]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(format_of, id="function"),
        pytest.param(lambda path: path[-3:], id="lambda"),
        pytest.param(partial(format_of, width=8), id="partial"),
        pytest.param(Formats().of, id="method of another object"),
        pytest.param(staticmethod(format_of), id="static"),
        pytest.param(str.lower, id="built-in"),
    ],
)
@pytest.mark.parametrize("bind", [False, True], ids=["free", "bound"])
def test_an_option_is_called_without_the_task(app, sizes, caplog, key, bind):
    """What the decorator is given as ``memsafe_key`` gets the arguments of the call, and nothing else."""
    task = declare(app, memsafe_key=key, bind=bind)
    assert label(sizes, app, task, "a.csv") in ("csv", "a.csv")
    assert not caplog.messages


@pytest.mark.parametrize("decorated", [False, True], ids=["class", "base"])
def test_a_method_has_its_task(app, sizes, caplog, decorated):
    """``memsafe_key`` of a class of tasks is a method like any other, also in the base of a decorated one."""

    def memsafe_key(self, path, *, upper=False):
        word = f"{self.name} {path.rpartition('.')[2]}"
        return word.upper() if upper else word

    if decorated:
        task = declare(app, method=memsafe_key)
    else:
        work = {"name": "proj.work", "run": lambda *_, **__: None, "memsafe_key": memsafe_key}
        task = app.register_task(type("Work", (app.Task,), work))
    assert label(sizes, app, task, "a.csv") == "proj.work csv"
    assert label(sizes, app, task, "a.csv", upper=True) == "PROJ.WORK CSV"
    assert not caplog.messages


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (staticmethod(format_of), "csv"),
        (classmethod(lambda cls, path: f"{cls.__name__} {path}"), "work a.csv"),
        (property(lambda task: lambda path: f"{task.name} {path}"), "proj.work a.csv"),
    ],
    ids=["static", "class", "property"],
)
def test_other_kinds_of_methods(app, sizes, caplog, method, found):
    """They are called as Python calls them."""
    assert label(sizes, app, declare(app, method=method), "a.csv") == found
    assert not caplog.messages


def test_the_decorator_is_asked_before_the_class(app, sizes):
    """An option takes the place of a method of the task's base class."""
    task = declare(app, method=lambda self, path: "method", memsafe_key=lambda path: "option")
    assert label(sizes, app, task, "a.csv") == "option"


def test_annotations_are_options(app, sizes):
    """A function that ``task_annotations`` gives to a decorated task is called without the task, too."""
    app.conf.task_annotations = {"proj.work": {"memsafe_key": format_of, "memsafe_memory": "1MiB"}}
    job = sized(sizes, app, declare(app), "a.csv")
    assert (job.label, job.estimate) == ("csv", certain(MIB))


@pytest.mark.parametrize("wrong", ["path", 5, 0, "", ["path"]])
def test_a_key_that_is_no_function(app, sizes, caplog, wrong):
    """It is one warning, and is left out."""
    task = declare(app, memsafe_key=wrong)
    for _ in range(2):
        assert label(sizes, app, task, "a.csv").startswith("celery/")
    [message] = caplog.messages
    assert message == (
        f"memsafe_key={wrong!r} of the task proj.work is not valid, and is left out: it must be a function "
        "that takes the arguments of a call."
    )


def test_a_key_that_fails(app, sizes, caplog):
    """It is one warning, and the size of the arguments is taken."""
    task = declare(app, memsafe_key=lambda path: {}[path])
    for _ in range(2):
        assert label(sizes, app, task, "a.csv").startswith("celery/")
    assert caplog.messages == [
        "memsafe_key of proj.work failed, and the arguments' size is taken: KeyError('a.csv')"
    ]


def test_labels_are_bounded(app, sizes):
    """Long words are cut, different ones stay different, and short ones are left as they are."""
    task = declare(app, memsafe_key=lambda word: word)
    words = ["x" * MOST_LABEL, "x" * (MOST_LABEL + 1), "x" * 10_000, "x" * 9_999 + "y", "\udc80" * 10_000]
    labels = [label(sizes, app, task, word) for word in words]
    assert labels[0] == words[0]
    assert all(len(each) == MOST_LABEL for each in labels)
    assert len(set(labels)) == len(words)
    assert labels == [label(sizes, app, task, word) for word in words]


def test_names_of_queues_are_bounded(app, sizes):
    """A label with the name of a queue in it is cut like any other."""
    task = declare(app)
    first, second = (label(sizes, app, task, queue="q" * 300 + end) for end in "ab")
    assert first != second
    assert len(first) == len(second) == MOST_LABEL


def test_three_sizes_under_one_name(app, sizes):
    """Calls are told apart by the size of their arguments and by their queue; three runs, and each is known.

    Until then the largest of the name's last runs is set aside for all of them.
    """
    task = declare(app)
    kinds = {
        "small": (5 * MIB, "x" * 10, "celery"),
        "large": (100 * MIB, "x" * 5000, "celery"),
        "of another queue": (30 * MIB, "x" * 10, "exports"),
    }

    def job_of(kind):
        _, text, queue = kinds[kind]
        return sized(sizes, app, task, text, queue=queue)

    for number in range(ENOUGH):
        assert number == 0 or job_of("small").estimate.reserved > 100 * MIB
        for kind, (peak, _, _) in kinds.items():
            sizes.learn(job_of(kind), peak)
    for kind, (peak, _, _) in kinds.items():
        expected = int(peak * STEADY)
        assert job_of(kind).estimate == Estimate(expected, expected, known=True, ended=expected), kind
    # A little more of the same is no other kind: it would have to be learned anew.
    assert sized(sizes, app, task, "x" * 5200).label == job_of("large").label


# What is wrong


@pytest.mark.parametrize("name", ["memsafe_memory", "memsafe_key", *LIMITS])
def test_an_attribute_that_cannot_be_read(app, sizes, caplog, name):
    """A property that raises is one warning, and is left out; what else is said of the task holds."""

    class Broken(app.Task):
        memsafe_memory = "3MiB"

    def raises(task):
        raise RuntimeError("no such\ntable")

    setattr(Broken, name, property(raises))
    task = declare(app, base=Broken)
    for _ in range(2):
        job = sized(sizes, app, task, "a.csv")
    assert job.estimate == (UNKNOWN if name == "memsafe_memory" else certain(3 * MIB))
    assert caplog.messages == [
        f"{name} of the task proj.work can not be read, and is left out: RuntimeError('no such\\ntable')"
    ]


class Talker:
    """Says much of itself, in several lines."""

    def __repr__(self):
        return "<line\u2028" * 5000


class Broken:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [
        "x" * 100_000,
        ["a\nb" * 1000] * 1000,
        {"a": {"b": ["c" * 1000] * 1000}},
        Talker(),
        Broken(),
        -(10**9000),
    ],
    ids=["text", "list", "dict", "lines", "broken", "number"],
)
def test_a_warning_is_one_short_line(app, sizes, caplog, value):
    """However long a value is, and whatever it says of itself."""

    def fail():
        raise ValueError(value)

    job = sized(sizes, app, declare(app, memsafe_memory=value, memsafe_key=fail))
    assert job.estimate is UNKNOWN
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert len(message) < MOST_SHOWN + 150
        assert len(message.splitlines()) == 1


def test_there_is_an_end_to_warnings(app, sizes, caplog):
    """A wrong header that is another one in each call fills no log."""
    task = declare(app)
    job = call(app, task)
    for number in range(MOST_COMPLAINTS + 5):
        job.args[2]["memsafe_memory"] = f"{number} apples"
        sizes.size_up(job)
    assert len(caplog.messages) == MOST_COMPLAINTS


def test_numbers_that_are_not_pythons_own(app, sizes, caplog):
    """What stands for a whole number is one: numpy's, for instance; but true is no size."""
    numpy = pytest.importorskip("numpy")
    task = declare(app, memsafe_memory=numpy.int64(5), memsafe_soft_limit=numpy.uint8(6))
    job = sized(sizes, app, task)
    assert (job.estimate, job.soft_limit) == (certain(5), 6)
    assert type(job.estimate.reserved) is int
    assert not caplog.messages
    job.args[2]["memsafe_memory"] = True
    sizes.size_up(job)
    assert len(caplog.messages) == 1


def test_a_call_that_is_none_of_celerys(app, sizes):
    """There are no headers to look at: the name is all that is known."""
    job = Job(print, (), {})
    sizes.size_up(job)
    assert job.estimate is UNKNOWN
    sizes.learn(job, 10 * MIB)
    sizes.size_up(job)
    assert job.estimate.known
    assert job.label is None


# What nobody can have


@pytest.mark.parametrize("said", ["1000000TiB", 10**30, 1e300, 2**63])
def test_more_than_the_budget_is_the_budget(app, sizes, caplog, said):
    """Whoever says so; it is said once."""
    sizes.budget = 540 * MIB
    silent, declared = declare(app), declare(app, "proj.large", memsafe_memory=said)
    for _ in range(2):
        assert sized(sizes, app, silent, headers={"memsafe_memory": said}).estimate == certain(540 * MIB)
        assert sized(sizes, app, declared).estimate == certain(540 * MIB)
    assert len(caplog.messages) == 2
    assert "of the header of proj.work is more than the budget, and is taken as 540 MiB." in caplog.text
    assert "of the task proj.large is more than the budget, and is taken as 540 MiB." in caplog.text
    sizes.budget = 1 << 61
    assert sized(sizes, app, declared).estimate.reserved > 540 * MIB


@pytest.mark.parametrize("said", [-1, float("nan"), float("inf"), "-1GiB", "nan", "1e400", "9" * 5000])
def test_what_is_no_size_is_left_out(app, sizes, caplog, said):
    """It is one warning."""
    sizes.budget = 540 * MIB
    task = declare(app)
    for _ in range(2):
        assert sized(sizes, app, task, headers={"memsafe_memory": said}).estimate is UNKNOWN
    assert len(caplog.messages) == 1
    assert "is not valid, and is left out" in caplog.text


def test_what_was_learned_is_within_the_budget(app, sizes, caplog):
    """It was higher when that was learned, or a file says so."""
    sizes.budget = 540 * MIB
    task = declare(app)
    sizes.learned.load([{"name": task.name, "label": None, "count": 3, "recent": [1 << 70], "most": 1 << 70}])
    estimate = sized(sizes, app, task).estimate
    assert (estimate.reserved, estimate.most) == (540 * MIB, 540 * MIB)
    assert not caplog.messages
