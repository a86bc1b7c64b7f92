"""Which threads libraries start, whether a forked child can use them, and how this pool would start children.

Prints the table of docs/how-to/choose-a-start-method.md for those libraries that are installed; names of
packages as arguments choose some. Each is tried in a process of its own, right after its import, and after it
was used. "A fork" is whether a process forked then can use it; "the pool" is how children start when that is
what the app's import has done. Linux only.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from typing import NamedTuple

from memsafe_pool import forkserver

SECONDS = 30.0


class Library(NamedTuple):
    """How a worker's app begins to use a library, and how its tasks go on."""

    package: str
    load: str
    use: str


NOBODY = "127.0.0.1:9"
DATA = "import numpy; X, y = numpy.random.rand(20_000, 4), numpy.random.rand(20_000)"

LIBRARIES = (
    Library("numpy", "import numpy", "numpy.ones((900, 900)) @ numpy.ones((900, 900))"),
    Library(
        "mkl",
        "import ctypes, glob, sys; mkl = ctypes.CDLL(glob.glob(sys.prefix + '/lib/libmkl_rt.so*')[0])",
        "n = 900; A = (ctypes.c_double * (n * n))(); one = ctypes.c_double(1.0); "
        "mkl.cblas_dgemm(101, 111, 111, n, n, n, one, A, n, A, n, one, A, n)",
    ),
    Library("pyarrow", "import pyarrow", "pyarrow.table({'a': range(100_000)}).sort_by('a').to_pandas()"),
    Library("pandas", "import pandas", "pandas.DataFrame({'a': range(100_000)}).groupby('a').sum()"),
    Library("polars", "import polars", "polars.DataFrame({'a': range(100_000)}).group_by('a').sum()"),
    Library("duckdb", "import duckdb", "duckdb.sql('select sum(range) from range(3_000_000)').fetchall()"),
    Library(
        "numba",
        "import numba, numpy",
        "numba.njit('(float64[:],)', parallel=True)(lambda a: a.sum())(numpy.ones(100_000))",
    ),
    Library(
        "scikit-learn",
        f"import sklearn.ensemble as e; {DATA}",
        "e.HistGradientBoostingRegressor(max_iter=5).fit(X, y)",
    ),
    Library(
        "lightgbm",
        f"import lightgbm as l; {DATA}",
        "l.LGBMRegressor(n_estimators=5, verbose=-1).fit(X, y)",
    ),
    Library(
        "xgboost",
        f"import xgboost as x; {DATA}",
        "x.XGBRegressor(n_estimators=5).fit(X, y)",
    ),
    Library("torch", "import torch", "torch.ones(900, 900) @ torch.ones(900, 900)"),
    Library(
        "tokenizers",
        "import tokenizers as t",
        "t.Tokenizer(t.models.BPE()).train_from_iterator(['some words'] * 9999)",
    ),
    Library(
        "opencv-python-headless",
        "import cv2, numpy",
        "cv2.GaussianBlur(numpy.ones((3000, 3000), 'uint8'), (9, 9), 3)",
    ),
    Library("orjson", "import orjson", "orjson.loads(orjson.dumps(list(range(100_000))))"),
    Library(
        "grpcio",
        f"import grpc; c = grpc.insecure_channel('{NOBODY}')",
        "\ntry:\n c.unary_unary('/a/b')(b'', timeout=2)\nexcept grpc.RpcError as exc:\n"
        " assert exc.code() == grpc.StatusCode.UNAVAILABLE, exc",
    ),
    Library(
        "sentry-sdk",
        f"import sentry_sdk as s; s.init('http://key@{NOBODY}/1')",
        "s.capture_message('hello'); s.flush(0.5)",
    ),
    Library(
        "opentelemetry-sdk",
        "from opentelemetry.sdk.trace import TracerProvider as P\n"
        "from opentelemetry.sdk.trace.export import BatchSpanProcessor as B, SpanExporter as E\n"
        "class N(E):\n def export(self, spans): return None\n"
        "p = P(); p.add_span_processor(B(N()))",
        "p.get_tracer('a').start_span('b').end(); p.force_flush(2000)",
    ),
    Library("ddtrace", "import ddtrace.auto, ddtrace", "ddtrace.tracer.trace('a').finish()"),
    Library(
        "newrelic",
        "import newrelic.agent as n; n.initialize(); a = n.register_application(timeout=0)",
        "\nwith n.BackgroundTask(a, 'a'):\n pass",
    ),
    Library(
        "psycopg",
        "import psycopg",
        "\ntry:\n psycopg.connect('host=127.0.0.1 port=9')\nexcept psycopg.OperationalError:\n pass",
    ),
    Library(
        "psycopg2-binary",
        "import psycopg2",
        "\ntry:\n psycopg2.connect('host=127.0.0.1 port=9')\nexcept psycopg2.OperationalError:\n pass",
    ),
    Library(
        "pymongo",
        f"import pymongo; c = pymongo.MongoClient('{NOBODY}', serverSelectionTimeoutMS=500)",
        "\ntry:\n c.a.b.find_one()\nexcept pymongo.errors.ServerSelectionTimeoutError:\n pass",
    ),
    Library(
        "boto3",
        "import boto3; c = boto3.client('s3', 'eu-west-1', aws_access_key_id='a', aws_secret_access_key='b')",
        "c.generate_presigned_url('get_object', {'Bucket': 'a', 'Key': 'b'})",
    ),
    Library("redis", "import redis; r = redis.Redis()", "r.ping()"),
    Library("gevent", "from gevent import monkey; monkey.patch_all(); import gevent", "gevent.sleep(0.01)"),
    Library("uvloop", "import asyncio, uvloop", "uvloop.run(asyncio.sleep(0.01))"),
)


def threads() -> str:
    """Name the threads besides this one; those that run Python code first."""
    python = forkserver.python_threads()
    native = list(forkserver.native_threads().values())
    names = [f"Python: {name}" for name, _ in python]
    names += [f"{name} x {native.count(name)}".removesuffix(" x 1") for name in dict.fromkeys(native)]
    return ", ".join(names) or "none"


def used_in_fork(use: str, scope: dict[str, object]) -> str:
    """Use the library in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            exec(use, scope)
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return "works" if code == 0 else f"fails ({code})"
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"


def start_method() -> str:
    """How children of a worker with these threads would start, if the app's import starts them."""
    return "`forkserver`" if forkserver.fork_works() else "`spawn`, after a trial"


def try_out(library: Library) -> None:
    """Print one row. In a process of its own."""
    scope: dict[str, object] = {}
    exec(library.load, scope)
    time.sleep(0.3)  # threads may start a moment later
    after_import = threads(), start_method()
    early = used_in_fork(library.use, scope)
    exec(library.use, scope)
    after_use = threads(), start_method()
    late = used_in_fork(library.use, scope)
    version = importlib.metadata.version(library.package)
    print(
        "|",
        " | ".join(
            [
                f"{library.package} {version}",
                after_import[0],
                early,
                after_import[1],
                after_use[0],
                late,
                after_use[1],
            ]
        ),
        "|",
    )
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Try the libraries that are installed, or those that are named."""
    installed = {each.name.lower().replace("_", "-") for each in importlib.metadata.distributions()}
    print(
        "| library | threads after import | a fork | the pool | threads after first use | a fork | the pool |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for library in LIBRARIES:
        if library.package in (sys.argv[1:] or installed):
            command = [sys.executable, __file__, "--one", library.package]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10 * SECONDS)
            print(
                done.stdout.strip() or f"| {library.package} | could not be tried: {done.stderr[-500:]} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        try_out(next(library for library in LIBRARIES if library.package == sys.argv[2]))
    main()
