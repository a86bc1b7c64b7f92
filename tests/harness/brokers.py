"""Real message brokers for the tests, each test on a private part of one.

Redis and RabbitMQ: the server that listens on the default local port, else a private server started in
a temporary folder on a free port, else the test is skipped with the reason.  Filesystem and SQLite need
nothing but a folder.

``TEST_REDIS_URL`` and ``TEST_RABBITMQ_URL`` name another server; the value ``private`` forces a private one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kombu
import pytest

from .waiting import DEADLINE, DeadlineMissed, until

KINDS = ("redis", "rabbitmq", "filesystem", "sqlite")

#: How a skip for want of a broker begins; such a skip fails the run when ``CI=true``.
NO_BROKER = "no broker"

REDIS_URL = "redis://127.0.0.1:6379/0"
RABBITMQ_URL = "amqp://guest:guest@127.0.0.1:5672//"


@dataclass
class Broker:
    """One test's own part of a broker: the Celery settings that lead to it, and how to remove it."""

    kind: str
    name: str
    config: dict[str, Any]
    folder: Path
    remove: Callable[[], None] = field(repr=False)

    @property
    def queue(self) -> str:
        return str(self.config["task_default_queue"])

    @property
    def has_remote_control(self) -> bool:
        """Whether the broker can carry ``inspect`` and ``control``."""
        return self.kind != "sqlite"

    @property
    def has_event_loop(self) -> bool:
        """Whether Celery runs its event loop on this broker."""
        return self.kind in ("redis", "rabbitmq")

    def disconnect(self) -> None:
        """Close what kombu keeps open in this process for a broker that is a file."""
        if self.kind == "sqlite":
            from kombu.transport.sqlalchemy import Channel

            for url in [url for url in Channel._engines if str(self.folder) in url]:
                engine, _ = Channel._engines.pop(url)
                engine.dispose()

    def waiting(self) -> int:
        """Number of messages in the task queue that no worker has fetched."""
        options = self.config.get("broker_transport_options", {})
        with kombu.Connection(self.config["broker_url"], transport_options=options) as connection:
            channel = connection.default_channel
            if self.kind == "rabbitmq":
                return int(channel.queue_declare(self.queue, passive=True).message_count)
            return int(channel._size(self.queue))


class Servers:
    """The broker servers of one test process; private ones start on first use and end with the session."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self.folder = folder
        self.pids: set[int] = set()
        self._urls: dict[str, str] = {}
        self._stops: list[Callable[[], None]] = []

    def open(self, kind: str) -> Broker:
        """A fresh, empty, isolated part of a broker of this kind."""
        return getattr(self, f"_open_{kind}")(f"t{uuid.uuid4().hex[:12]}")

    def url(self, kind: str) -> str:
        """Address of the Redis or RabbitMQ server; skips the test where there is none."""
        if kind not in self._urls:
            self._urls[kind] = _redis_url(self) if kind == "redis" else _rabbitmq_url(self)
        answer = self._urls[kind]
        if answer.startswith(NO_BROKER):
            pytest.skip(answer)
        return answer

    def run(self, command: list[str], env: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
        """Start a private server in a folder of its own."""
        with open(folder / "server.log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pids.add(process.pid)
        self._stops.append(lambda: self._end(process))
        return process

    def on_close(self, stop: Callable[[], None]) -> None:
        self._stops.append(stop)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
        self.pids.discard(process.pid)

    def close(self) -> None:
        while self._stops:
            self._stops.pop()()

    def _open_redis(self, name: str) -> Broker:
        url, prefix = self.url("redis"), f"{name}:"
        config = {
            "broker_url": url,
            "broker_transport_options": {"global_keyprefix": prefix},
            "task_default_queue": name,
            **_redis_results(url, prefix),
        }
        return Broker("redis", name, config, self.folder(name), lambda: _forget_keys(url, prefix))

    def _open_rabbitmq(self, name: str) -> Broker:
        url = self.url("rabbitmq")
        results, forget = self._results(name)
        config = {
            "broker_url": url,
            "task_default_queue": name,
            "task_default_exchange": name,
            "task_default_routing_key": name,
            "control_exchange": f"{name}control",
            "event_exchange": f"{name}events",
            "event_queue_prefix": f"{name}events",
            **results,
        }

        def remove() -> None:
            _delete_from_rabbitmq(url, name)
            forget()

        return Broker("rabbitmq", name, config, self.folder(name), remove)

    def _open_filesystem(self, name: str) -> Broker:
        importlib.import_module("folders")  # the transport, from tests/projects
        folder = self.folder(name)
        for part in ("messages", "control", "processed"):
            (folder / part).mkdir()
        results, forget = self._results(name)
        config = {
            "broker_url": "folders://",
            "broker_transport_options": {
                "data_folder_in": str(folder / "messages"),
                "data_folder_out": str(folder / "messages"),
                "control_folder": str(folder / "control"),
                "processed_folder": str(folder / "processed"),
                # Without this the transport moves each message through the shared temporary folder.
                "store_processed": True,
                "polling_interval": 0.1,
            },
            "task_default_queue": name,
            **results,
        }
        return Broker("filesystem", name, config, folder, forget)

    def _open_sqlite(self, name: str) -> Broker:
        folder = self.folder(name)
        results, forget = self._results(name)
        config = {
            "broker_url": f"sqla+sqlite:///{folder / 'broker.sqlite'}",
            "broker_transport_options": {
                "connect_args": {"timeout": 30}
            },  # seconds to wait for the file's lock
            "task_default_queue": name,
            **results,
        }
        return Broker("sqlite", name, config, folder, forget)

    def _results(self, name: str) -> tuple[dict[str, Any], Callable[[], None]]:
        """Result settings for brokers that keep no results: Redis where there is one, else files."""
        try:
            url = self.url("redis")
        except pytest.skip.Exception:
            folder = self.folder(f"{name}-results")
            return {"result_backend": f"file://{folder}"}, lambda: shutil.rmtree(folder, ignore_errors=True)
        prefix = f"{name}:"
        return _redis_results(url, prefix), lambda: _forget_keys(url, prefix)


def _redis_results(url: str, prefix: str) -> dict[str, Any]:
    return {"result_backend": url, "result_backend_transport_options": {"global_keyprefix": prefix}}


def _forget_keys(url: str, prefix: str) -> None:
    import redis

    with redis.Redis.from_url(url) as client:
        keys = list(client.scan_iter(match=f"*{prefix}*", count=1000))
        for start in range(0, len(keys), 500):
            client.delete(*keys[start : start + 500])


def _delete_from_rabbitmq(url: str, name: str) -> None:
    with kombu.Connection(url) as connection:
        channel = connection.default_channel
        channel.queue_delete(name)
        for exchange in (name, f"{name}events", f"{name}control.pidbox", f"reply.{name}control.pidbox"):
            channel.exchange_delete(exchange)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    connection = kombu.Connection(url, connect_timeout=15)
    try:
        connection.connect()
        if url.startswith("redis"):
            connection.default_channel.client.ping()
    except (OSError, *connection.connection_errors):
        return False
    finally:
        connection.release()
    return True


def _started(
    servers: Servers, url: str, process: subprocess.Popen[bytes], folder: Path, timeout: float
) -> str:
    """The address, once the private server answers on it; else the reason why there is none."""
    try:
        until(
            lambda: _answers(url) or process.poll() is not None,
            f"{process.args} to answer",
            timeout,
            every=0.2,
        )
    except DeadlineMissed:
        reason = f"did not answer within {timeout:g} s"
    else:
        if process.poll() is None:
            return url
        reason = f"ended with {process.returncode}"
    servers._end(process)
    log = (folder / "server.log").read_text(errors="replace")[-2000:]
    return f"{NO_BROKER}: the private server {process.args} {reason}: {log}"


def _redis_url(servers: Servers) -> str:
    if importlib.util.find_spec("redis") is None:
        return f"{NO_BROKER}: the Python package 'redis' is not installed"
    wanted = os.environ.get("TEST_REDIS_URL", REDIS_URL)
    if wanted != "private" and _answers(wanted):
        return wanted
    program = shutil.which("redis-server")
    if program is None:
        return f"{NO_BROKER}: no Redis on {wanted} and no redis-server to start"
    port, folder = _free_port(), servers.folder("redis-server")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    process = servers.run(command, {}, folder)
    return _started(servers, f"redis://127.0.0.1:{port}/0", process, folder, DEADLINE / 2)


def _rabbitmq_url(servers: Servers) -> str:
    wanted = os.environ.get("TEST_RABBITMQ_URL", RABBITMQ_URL)
    if wanted != "private" and _answers(wanted):
        return wanted
    # Debian's /usr/sbin/rabbitmq-server insists on the system user and folders; the one it wraps does not.
    program = shutil.which("/usr/lib/rabbitmq/bin/rabbitmq-server") or shutil.which("rabbitmq-server")
    if program is None:
        return f"{NO_BROKER}: no RabbitMQ on {wanted} and no rabbitmq-server to start"
    port, folder = _free_port(), servers.folder("rabbitmq-server")
    epmd_port = _free_port()
    (folder / "enabled_plugins").write_text("[].\n")
    env = {
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"{folder.name}{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(_free_port()),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
    }
    epmd = shutil.which("epmd")
    if epmd is not None:
        # The Erlang port mapper goes to the background by itself; it is asked to leave after the server.
        servers.on_close(
            lambda: (
                subprocess.run(
                    [epmd, "-port", str(epmd_port), "-kill"], capture_output=True, check=False, timeout=30
                )
                and None
            )
        )
    process = servers.run([program], env, folder)
    return _started(servers, f"amqp://guest:guest@127.0.0.1:{port}//", process, folder, 90)
