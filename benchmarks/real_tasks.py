"""Work that tasks really do, for `real_work`: what allocates, is computed with, and is freed again.

Each function does `rounds` rounds of its kind. Sizes are in bytes.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

try:
    from PIL import Image, ImageFilter
except ImportError:  # of the bench extra
    Image = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 300_000
MEBIBYTE = 1 << 20


def temporaries(rounds: int, size: int) -> None:
    """Compute with arrays; each operator makes another one of that size."""
    a, b = np.ones(size // 8), np.ones(size // 8)
    for _ in range(rounds):
        ((a + b) * 2.0).sum()


def chunks(rounds: int, size: int) -> None:
    """Read a stream in pieces of that size."""
    with open("/dev/zero", "rb", buffering=0) as stream:
        for _ in range(rounds):
            stream.read(size)


def _frame() -> pd.DataFrame:
    numbers = np.arange(ROWS, dtype=float)
    return pd.DataFrame({"a": numbers, "b": numbers[::-1].copy(), "k": np.arange(ROWS) % 100})


def groupby(rounds: int, _: int) -> None:
    """Add a column, and sum it up in groups."""
    frame = _frame()
    for _ in range(rounds):
        frame["c"] = frame.a * frame.b + frame.a / 2
        frame.groupby("k").c.sum()


def sort(rounds: int, _: int) -> None:
    """Filter and sort."""
    frame = _frame()
    for _ in range(rounds):
        frame[frame.a > 3].sort_values("b")


def merge(rounds: int, _: int) -> None:
    """Join with a small table."""
    frame, names = _frame(), pd.DataFrame({"k": np.arange(100), "name": np.arange(100) * 2.0})
    for _ in range(rounds):
        frame.merge(names, on="k")


def dumps(rounds: int, size: int) -> None:
    """Write and read a JSON document of that size."""
    row = {"id": 12345, "name": "a row of some length", "values": [1.5, 2.5, 3.5], "on": True}
    rows = [dict(row, id=at) for at in range(size // len(json.dumps(row)))]
    for _ in range(rounds):
        json.loads(json.dumps(rows))


def compress(rounds: int, size: int) -> None:
    """Compress, encode, and back again."""
    data = bytes(range(256)) * (size // 256)
    for _ in range(rounds):
        text = base64.b64encode(zlib.compress(data, 1)).decode()
        zlib.decompress(base64.b64decode(text))
        str(data, "latin-1").encode("latin-1")
        gzip.compress(data, 1)


def encode(rounds: int, size: int) -> None:
    """Encode as base64 and as text, and back again."""
    data = bytes(range(256)) * (size // 256)
    for _ in range(rounds):
        base64.b64decode(base64.b64encode(data).decode())


def pillow(rounds: int, _: int) -> None:
    """Decode, resize, blur and encode a picture of 12 megapixels."""
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGB").save(picture, "JPEG")
    for _ in range(rounds):
        picture.seek(0)
        small = Image.open(picture).resize((1600, 1200)).filter(ImageFilter.BoxBlur(2))
        small.rotate(90).save(io.BytesIO(), "JPEG")


#: Name in the table: function, size, rounds of one task of about 0.2 s.
KINDS: dict[str, tuple[Callable[[int, int], Any], int, int]] = {
    "numpy temporaries of 0.25 MB": (temporaries, MEBIBYTE // 4, 2000),
    "numpy temporaries of 1 MB": (temporaries, MEBIBYTE, 600),
    "numpy temporaries of 2 MB": (temporaries, 2 * MEBIBYTE, 300),
    "numpy temporaries of 4 MB": (temporaries, 4 * MEBIBYTE, 150),
    "numpy temporaries of 8 MB": (temporaries, 8 * MEBIBYTE, 60),
    "numpy temporaries of 24 MB": (temporaries, 24 * MEBIBYTE, 20),
    "reading in chunks of 64 KB": (chunks, 64 << 10, 20_000),
    "reading in chunks of 1 MB": (chunks, MEBIBYTE, 2000),
    "reading in chunks of 4 MB": (chunks, 4 * MEBIBYTE, 500),
    "reading in chunks of 16 MB": (chunks, 16 * MEBIBYTE, 100),
    "pandas groupby, 300,000 rows": (groupby, 0, 20),
    "pandas filter and sort": (sort, 0, 8),
    "pandas merge": (merge, 0, 12),
    "json of 20 MB": (dumps, 20 * MEBIBYTE, 1),
    "zlib of 3 MB": (compress, 3 * MEBIBYTE, 8),
    "base64 of 3 MB": (encode, 3 * MEBIBYTE, 20),
    "Pillow, 12 megapixels": (pillow, 0, 2),
}


def work(kind: str, share: float = 1.0) -> None:
    """Do one task's work, or a share of it."""
    function, size, rounds = KINDS[kind]
    function(max(int(rounds * share), 1), size)
