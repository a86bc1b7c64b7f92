"""Fixtures: brokers, workers, start methods; the check after each test; the account of skips at the end."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import celery
import pytest
from harness import cgroup
from harness.brokers import KINDS, NO_BROKER, Broker, Servers
from harness.proxy import Proxy
from harness.residue import Residue
from harness.worker import OURS, POOL, PROJECTS, Worker

sys.path.insert(0, str(PROJECTS))

#: Workers of this test process that are running now.
living: list[Worker] = []

StartWorker = Callable[..., Worker]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


INSTALLED = _version(celery.__version__)

#: Did a phase of the test fail?
FAILED = pytest.StashKey[bool]()


# Options and marks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "stock_differs(reason, run=True, before=None): Celery's own pool is known to behave otherwise; "
        "run=False where it would hang or take the test run with it; before: only in older Celery",
    )
    config.addinivalue_line(
        "markers", "cgroup: is about memory cgroups; also each test with a fixture of these (`make test-v2`)"
    )
    config.addinivalue_line("markers", "ours_only(reason): says something that only this project's pool has")
    config.addinivalue_line(
        "markers", "also_start_method(name, ...): more values for the parameter start_method"
    )
    config.addinivalue_line("markers", "needs_celery(version): for a feature of this Celery version or later")
    # kombu's SQLAlchemy models, with SQLAlchemy 2.1
    config.addinivalue_line("filterwarnings", "ignore:The ..noload.. loader strategy is deprecated")
    # A shell has its background jobs ignore Ctrl-C, and all that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if INSTALLED < (5, 7):
        # Older Celery calls what redis-py has deprecated since.
        config.addinivalue_line(
            "filterwarnings", "ignore:Call to .*(setex|get_connection):DeprecationWarning"
        )
        # A connection to the result backend may be left to the collector; what stays open is found anyway.
        config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")
        config.addinivalue_line(
            "filterwarnings", "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
        )
    if config.getoption("dist", "no") == "load":
        # Tests that share a worker stay together; see pytest_collection_modifyitems.
        config.option.dist = "loadgroup"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "start_method" in metafunc.fixturenames:
        extra = [m for mark in metafunc.definition.iter_markers("also_start_method") for m in mark.args]
        methods = ["forkserver", "spawn", *extra] if OURS else ["stock"]
        metafunc.parametrize("start_method", methods, indirect=True, scope="module")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "container" in getattr(item, "fixturenames", ()):
            item.add_marker("cgroup")
        _account_for_celery_version(item)
        if not OURS:
            _account_for_stock(item)
        if "start_module_worker" in getattr(item, "fixturenames", ()):
            callspec = getattr(item, "callspec", None)
            shared = callspec.params if callspec else {}
            group = [
                item.path.stem,
                *(str(shared[name]) for name in ("start_method", "broker_kind") if name in shared),
            ]
            item.add_marker(pytest.mark.xdist_group("-".join(group)))


def _account_for_stock(item: pytest.Item) -> None:
    for mark in item.iter_markers("ours_only"):
        item.add_marker(pytest.mark.skip(reason=f"only in this project's pool: {mark.args[0]}"))
    for mark in item.iter_markers("stock_differs"):
        run, before = mark.kwargs.get("run", True), mark.kwargs.get("before")
        if before is not None and _version(before) <= INSTALLED:
            continue
        item.add_marker(pytest.mark.xfail(reason=f"stock: {mark.args[0]}", run=run, strict=False))


def _account_for_celery_version(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_celery"):
        wanted = mark.args[0]
        if _version(wanted) > INSTALLED:
            item.add_marker(pytest.mark.skip(reason=f"needs Celery {wanted}, this is {celery.__version__}"))


# Brokers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    def folder(name: str) -> Path:
        path: Path = tmp_path_factory.mktemp(name, numbered=True)
        return path

    found = Servers(folder)
    yield found
    found.close()


@pytest.fixture
def outlasting(nothing_left: None) -> Iterator[ExitStack]:
    """What must be there for as long as the workers of the test, whichever fixture is asked for first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def open_broker(outlasting: ExitStack, servers: Servers) -> Callable[[str], Broker]:
    """Open fresh parts of brokers, by their kind."""

    def opened(kind: str) -> Broker:
        broker = servers.open(kind)
        outlasting.callback(broker.remove)
        return broker

    return opened


@pytest.fixture
def open_proxy(outlasting: ExitStack) -> Callable[[Broker], Proxy]:
    """Put proxies before brokers."""

    def opened(broker: Broker) -> Proxy:
        proxy = Proxy(broker.config["broker_url"])
        outlasting.callback(proxy.close)
        return proxy

    return opened


@pytest.fixture(params=KINDS)
def broker(open_broker: Callable[[str], Broker], request: pytest.FixtureRequest) -> Broker:
    """A fresh part of each of the four brokers in turn."""
    return open_broker(request.param)


@pytest.fixture
def redis(open_broker: Callable[[str], Broker]) -> Broker:
    return open_broker("redis")


@pytest.fixture
def rabbitmq(open_broker: Callable[[str], Broker]) -> Broker:
    return open_broker("rabbitmq")


@pytest.fixture
def filesystem(open_broker: Callable[[str], Broker]) -> Broker:
    return open_broker("filesystem")


@pytest.fixture
def sqlite(open_broker: Callable[[str], Broker]) -> Broker:
    return open_broker("sqlite")


@pytest.fixture(scope="module", params=KINDS)
def broker_kind(request: pytest.FixtureRequest) -> str:
    """Name of each of the four brokers in turn, for a worker shared by a module."""
    return str(request.param)


# Workers


@pytest.fixture(scope="module")
def start_method(request: pytest.FixtureRequest) -> str:
    """Each start method in turn: forkserver, spawn, and what the mark ``also_start_method`` adds."""
    return str(request.param)


def _factory(servers: Servers, folders: pytest.TempPathFactory) -> Iterator[StartWorker]:
    workers: list[Worker] = []
    brokers: list[Broker] = []

    def start(
        module: str = "proj",
        *arguments: str,
        config: dict[str, Any] | None = None,
        broker: Broker | str = "redis",
        start_method: str | None = None,
        ready: bool = True,
        prepare: Callable[[Worker], None] | None = None,
        **options: Any,
    ) -> Worker:
        if isinstance(broker, str):
            broker = servers.open(broker)
            brokers.append(broker)
        settings = dict(config or {})
        if OURS and start_method is not None:
            settings["memsafe_start_method"] = start_method
        folder = folders.mktemp("w") / "work"
        worker = Worker(folder, broker, module, settings, arguments, **options)
        workers.append(worker)
        living.append(worker)
        if prepare is not None:
            prepare(worker)
        return worker.start(ready=ready)

    yield start
    problems = []
    for worker in workers:
        try:
            worker.close()
        except AssertionError as exc:
            problems.append(f"{exc}\n{worker.log_tail()}")
        living.remove(worker)
    for opened in brokers:
        opened.remove()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture
def start_worker(
    outlasting: ExitStack, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartWorker]:
    """Start real workers that end with the test.

    ``start_worker(module="proj", *arguments, config={}, broker="redis", start_method=None,
    concurrency=2, pool=..., env={}, loglevel="INFO", command=None, ready=True, prepare=None)``:
    ``module`` is from ``tests/projects``, ``arguments`` are more of the command line, ``broker`` is a
    kind or a Broker, ``pool=None`` leaves ``--pool`` out, ``prepare(worker)`` runs before the command
    does, with ``worker.folder`` to put files into.
    """
    yield from _factory(servers, tmp_path_factory)


@pytest.fixture(scope="module")
def start_module_worker(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWorker]:
    """As ``start_worker``, for workers that the tests of a module share."""
    yield from _factory(servers, tmp_path_factory)


@pytest.fixture
def container(outlasting: ExitStack) -> Callable[[int], cgroup.Cgroup]:
    """Make memory cgroups: ``container(mib)``; the test is skipped where that is not possible."""
    return lambda mib: outlasting.enter_context(cgroup.limited(mib << 20))


@pytest.fixture
def start_contained(
    container: Callable[[int], cgroup.Cgroup], start_worker: StartWorker
) -> Callable[..., Worker]:
    """As ``start_worker``, in a memory cgroup: ``start_contained(cgroup or MiB, ...)``."""

    def start(room: cgroup.Cgroup | int, *arguments: str, **options: Any) -> Worker:
        group = container(room) if isinstance(room, int) else room
        return start_worker(*arguments, prepare=group.hold, **options)

    return start


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: no process, zombie or descriptor of it is left."""
    if "servers" in request.fixturenames:
        request.getfixturevalue("servers")
    before = Residue()
    yield
    for worker in living:
        worker.disconnect()

    def allowed() -> set[int]:
        pids: set[int] = set().union(*(worker.pids() for worker in living))
        if "servers" in request.fixturenames:
            pids |= _with_descendants(request.getfixturevalue("servers").pids)
        return pids

    before.check(allowed, with_descriptors=not request.node.stash.get(FAILED, False))


def _with_descendants(pids: set[int]) -> set[int]:
    import psutil

    found = set(pids)
    for pid in pids:
        found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return found


# What a failure shows, and the account at the end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
        for worker in living:
            report.sections.append((f"worker {worker.hostname}", worker.log_tail()))
    return report


def _skips(reporter: Any) -> Counter[str]:
    def reason(report: Any) -> str:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return str(text).removeprefix("Skipped: ").strip()

    return Counter(reason(report) for report in reporter.stats.get("skipped", []))


def _is_fatal(config: pytest.Config) -> bool:
    """Tell whether tests missed a broker where that must not happen."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or os.environ.get("CI", "").lower() not in ("true", "1"):
        return False
    return any(reason.startswith(NO_BROKER) for reason in _skips(reporter))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and _is_fatal(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skips = _skips(terminalreporter)
    write = terminalreporter.write_line
    write(f"pool: {POOL}, Celery {celery.__version__}, skipped: {sum(skips.values())}")
    for reason, count in skips.most_common():
        write(f"  {count} x {reason}")
    if _is_fatal(config):
        write("FAILED: CI=true and tests were skipped because they had no broker", red=True)
