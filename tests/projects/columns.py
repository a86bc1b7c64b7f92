"""An app that imports pandas and pyarrow, whose allocator has a thread of its own."""

import os

import pandas as pd
import pyarrow as pa
from witness import app, meet, place  # noqa: F401


@app.task
def total(rows):
    """Allocate with both, and with pyarrow's own threads."""
    table = pa.table({"key": [number % 10 for number in range(rows)], "value": range(rows)})
    by_key = table.group_by("key").aggregate([("value", "sum")]).to_pandas()
    assert by_key["value_sum"].sum() == pd.Series(range(rows)).sum()
    return os.getpid()
