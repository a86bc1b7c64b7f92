"""Redis for the benchmarks, and each worker's own corner of it.

The server on the default local port is used when it answers, else a private one is started. Nothing but keys
with the lane's own prefix is written or deleted.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import redis
from celery import Celery
from kombu import Exchange, Queue

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_PORT = 6379
DATABASE = 11
_CONTROL = Exchange("celery.pidbox", type="fanout", durable=False)
_REPLIES = Exchange("reply.celery.pidbox", type="direct", durable=False)


def _answers(port: int) -> bool:
    try:
        return bool(redis.Redis(port=port, socket_timeout=1).ping())
    except redis.RedisError:
        return False


@contextmanager
def redis_url() -> Iterator[str]:
    """Give the URL of a Redis database that lives at least as long as the context."""
    if _answers(DEFAULT_PORT):
        yield f"redis://127.0.0.1:{DEFAULT_PORT}/{DATABASE}"
        return
    server = shutil.which("redis-server")
    if server is None:
        message = f"no Redis answers on port {DEFAULT_PORT}, and there is no redis-server to start"
        raise SystemExit(message)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as folder:
        command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while not _answers(port):
                if time.monotonic() > deadline or process.poll() is not None:
                    message = f"redis-server on port {port} did not come up"
                    raise SystemExit(message)
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/{DATABASE}"
        finally:
            process.terminate()
            process.wait(timeout=10)


class Lane:
    """One worker's own key prefix, with a producer for it. The producer does not import the app."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"bench-{uuid.uuid4().hex[:12]}:"
        self.app = Celery("lane", broker=url, set_as_current=False)
        self.app.conf.update(
            task_ignore_result=True, broker_transport_options={"global_keyprefix": self.prefix}
        )
        self._redis = redis.Redis.from_url(url)

    def send(self, name: str, *args: object) -> None:
        """Publish one task to the worker's queue."""
        self.app.send_task(name, args, queue="bench")

    def stage(self, name: str, *args: object, count: int = 1) -> list[str]:
        """Publish `count` tasks to a queue that nobody reads; return their ids."""
        with self.app.producer_pool.acquire(block=True) as producer:
            return [
                self.app.send_task(name, args, queue="staging", producer=producer).id for _ in range(count)
            ]

    def release(self) -> None:
        """Let the worker have all staged tasks at once.

        A message says where it was sent, and goes back there when it is rejected: not to the staging queue.
        """
        staging = self.prefix + "staging"
        messages = [
            message.replace(b'"routing_key": "staging"', b'"routing_key": "bench"')
            for message in self._redis.lrange(staging, 0, -1)
        ]
        with self._redis.pipeline() as pipeline:
            pipeline.delete(staging).rpush(staging, *messages).renamenx(staging, self.prefix + "bench")
            released = pipeline.execute()[-1]
        if not released:
            message = "tasks are still waiting in the worker's queue"
            raise RuntimeError(message)

    def pending(self) -> int:
        """Count the tasks that wait in the queue, or that the worker has but no child has accepted yet."""
        return int(self._redis.llen(self.prefix + "bench")) + int(self._redis.hlen(self.prefix + "unacked"))

    def trickle(self, in_flight: int, timeout: float = 120) -> None:
        """Let the worker have the staged tasks, at most so many at a time, until it has had them all."""
        deadline = time.monotonic() + timeout
        while self._redis.exists(self.prefix + "staging"):
            room = in_flight - self.pending()
            for _ in range(room):
                self._redis.lmove(self.prefix + "staging", self.prefix + "bench", "RIGHT", "LEFT")
            if room <= 0:
                time.sleep(0.0005)
            if time.monotonic() > deadline:
                message = f"after {timeout:g} s the worker has not had all tasks"
                raise RuntimeError(message)

    def ping(self, worker: str) -> bool:
        """Send `ping` to the worker once more, and tell whether it has answered any."""
        self._request(worker, "ping")
        return bool(self._redis.exists(self.prefix + "reply-ping"))

    def stats(self, worker: str, timeout: float = 30) -> dict[str, Any]:
        """Return what `inspect stats` gives."""
        return self.ask(worker, "stats", timeout)

    def ask(self, worker: str, method: str, timeout: float = 30) -> Any:
        """Return what `inspect <method>` gives."""
        self._redis.delete(self.prefix + f"reply-{method}")
        self._request(worker, method)
        reply = self._redis.blpop(self.prefix + f"reply-{method}", timeout)
        if reply is None:
            message = f"no {method} from {worker} in {timeout:g} s"
            raise RuntimeError(message)
        return json.loads(base64.b64decode(json.loads(reply[1])["body"]))[worker]

    def _request(self, worker: str, method: str) -> None:
        """Send a remote control command; the answer goes to the list `reply-<method>`.

        Celery's own `control` is not used: what it sends before the worker listens is lost, and trying
        again takes a second each time, since on Redis it ends with its blocking read.
        """
        queue = f"reply-{method}"
        with self.app.producer_pool.acquire(block=True) as producer:
            Queue(queue, _REPLIES, routing_key=queue)(producer.channel).declare()
            reply_to = {"exchange": _REPLIES.name, "routing_key": queue}
            request = {"method": method, "arguments": {}, "destination": [worker]}
            producer.publish(
                {**request, "ticket": queue, "reply_to": reply_to}, exchange=_CONTROL, declare=[_CONTROL]
            )

    def close(self) -> None:
        """Disconnect and delete every key of this lane."""
        self.app.close()
        keys = list(self._redis.scan_iter(self.prefix + "*", count=1000))
        if keys:
            self._redis.delete(*keys)
        self._redis.close()
