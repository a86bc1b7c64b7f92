"""Says all that a task can see of its process and that somebody may rely on.

When the worker starts, much is set to what is not usual, so that it shows where it comes from.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import faulthandler
import gc
import json
import locale
import logging
import os
import random
import re
import resource
import signal
import socket
import stat
import sys
import threading
import time
import warnings
from pathlib import Path

import billiard
import numpy as np
from celery import Celery, _state, current_app, signals
from celery.app import trace

app = Celery("resemblance")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))

context = contextvars.ContextVar("context", default="unset")


class Policy(asyncio.DefaultEventLoopPolicy):
    """One that can be told from the default."""


@signals.celeryd_init.connect
def change_process(conf, **kwargs):
    """Change what the system keeps of a process."""
    os.umask(0o027)
    os.environ["SET_IN_THE_WORKER"] = "yes"
    os.nice(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    conf.task_routes = {"nowhere": {"queue": "nowhere"}}


@signals.worker_init.connect
def change_interpreter(**kwargs):
    """Change what Python keeps of it."""
    sys.path.append("/added/in/the/worker")
    sys.setrecursionlimit(1234)
    sys.setswitchinterval(0.01)
    decimal.getcontext().prec = 7
    decimal.DefaultContext.traps[decimal.Inexact] = True
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    warnings.filterwarnings("ignore", "made up", FutureWarning)
    logging.getLogger("made.up").setLevel(logging.CRITICAL)
    logging.addLevelName(17, "SEVENTEEN")
    gc.set_threshold(701, 11, 12)
    socket.setdefaulttimeout(77)
    np.random.seed(5)  # noqa: NPY002 - a state that the process has
    np.seterr(all="ignore")
    context.set("set in the worker")
    sys.excepthook = excepthook
    signal.signal(signal.SIGWINCH, on_signal)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])


def excepthook(*args):
    sys.__excepthook__(*args)


def on_signal(signum, frame):
    """Nothing."""


def show(value):
    """A text without what is different in each process."""
    if (isinstance(value, int) and not isinstance(value, bool)) or value is None:
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = re.sub(r"0x[0-9a-f]+", "0x", str(value))
    return re.sub(r"\bt[0-9a-f]{12}w\d+@", "worker@", text).replace(str(Path.cwd().parent), "FOLDER")


def of_descriptor(number):
    """What kind of file it is."""
    mode = os.fstat(number).st_mode
    kinds = {stat.S_ISSOCK: "socket", stat.S_ISFIFO: "pipe", stat.S_ISREG: "file", stat.S_ISCHR: "device"}
    return next((name for test, name in kinds.items() if test(mode)), "other")


def of_logger(name):
    logger = logging.getLogger(name)
    handlers = [
        (type(handler).__name__, handler.level, getattr(handler.formatter, "_fmt", None))
        for handler in logger.handlers
    ]
    return logger.level, logger.propagate, logger.disabled, handlers


@app.task
def look():
    """Each fact with its name."""
    process = billiard.current_process()
    main = sys.modules["__main__"]
    facts = {
        "arguments": [argument for argument in sys.argv if argument not in {"prefork", "memsafe_pool:Pool"}],
        "affinity": sorted(os.sched_getaffinity(0)),
        "asyncio policy": type(asyncio.get_event_loop_policy()).__name__,
        "app is finalized": app.finalized,
        "app is the current one": current_app._get_current_object() is app,
        "app is the default one": _state.default_app is app,
        "configuration": {name: app.conf.changes.get(name) for name in ("task_routes", "worker_concurrency")},
        "contextvar": context.get(),
        "core limit": resource.getrlimit(resource.RLIMIT_CORE),
        "decimal context": decimal.getcontext(),
        "decimal default": decimal.DefaultContext,
        "directory": os.getcwd(),
        "environment": {
            name: value for name, value in os.environ.items() if not name.startswith(("TEST_", "_MP_"))
        },
        "excepthook": sys.excepthook,
        "faulthandler": faulthandler.is_enabled(),
        "float errors": np.geterr(),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "groups": (os.getresuid(), os.getresgid(), sorted(os.getgroups())),
        "joins block": _state.task_join_will_block(),
        "limits": {
            name: resource.getrlimit(getattr(resource, name))
            for name in dir(resource)
            if name.startswith("RLIMIT_")
        },
        "levels": (logging.getLevelName(17), logging.raiseExceptions, logging.root.manager.disable),
        "locale": locale.setlocale(locale.LC_ALL),
        "loggers": {
            name: of_logger(name) for name in (None, "celery", "celery.task", "celery.worker", "made.up")
        },
        "main module": (main.__name__, getattr(main, "__file__", None), getattr(main.__spec__, "name", None)),
        "nice": os.nice(0),
        "numpy random": np.random.random(),  # noqa: NPY002
        "open files": sorted({of_descriptor(number) for number in range(3)}),
        "oom score": Path("/proc/self/oom_score_adj").read_text(),
        "path": sys.path,
        "process": (re.sub(r"^.*?(PoolWorker)-\d+", r"\1", process.name), process.daemon, process.index),
        "process group": os.getpgrp() == os.getpgid(os.getppid()),
        "session": os.getsid(0) == os.getsid(os.getppid()),
        "random is our own": random.random() != random.Random(5).random(),
        "recursion limit": sys.getrecursionlimit(),
        "registry": sorted(app.tasks),
        "registry of the tracer": trace._localized[0] is app._tasks,
        "signals": {
            number.name: signal.getsignal(number)
            for number in sorted(signal.valid_signals())
            if isinstance(number, signal.Signals)
        },
        "signals that are blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "socket timeout": socket.getdefaulttimeout(),
        "standard input": os.readlink("/proc/self/fd/0"),
        "standard streams": [type(stream).__name__ for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "start method": billiard.get_start_method(allow_none=True),
        "switch interval": sys.getswitchinterval(),
        "threads": [thread.name for thread in threading.enumerate()],
        "time zone": time.tzname,
        "timers": signal.getitimer(signal.ITIMER_REAL),
        "umask": re.search(r"Umask:\s*(.*)", Path("/proc/self/status").read_text()).group(1),
        "warning filters": [
            (action, show(category), text and getattr(text, "pattern", text))
            for action, text, category, *_ in warnings.filters
        ],
    }
    return {
        name: {key: show(of) for key, of in fact.items()} if isinstance(fact, dict) else show(fact)
        for name, fact in facts.items()
    }
