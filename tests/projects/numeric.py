"""An app that imports numpy, whose OpenBLAS has threads of its own."""

import numpy as np
from witness import app, meet, place  # noqa: F401

ones = np.ones((300, 300))
(ones @ ones).sum()


@app.task
def product():
    """Multiply matrices that are large enough for several threads."""
    return float((ones @ ones).sum())
