"""A Celery app with a memory-hungry job: index modules of Python's standard library.

Each task parses a batch of modules, keeps all their syntax trees at once (some 30 bytes for each byte of
source, in small objects), and returns a few numbers. What it leaves behind is a large, fragmented heap.

The broker is the folder that the environment variable STDLIB_INDEX_FOLDER names; without it, the default one.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import folder_broker
from celery import Celery

app = Celery("stdlib_index")
if "STDLIB_INDEX_FOLDER" in os.environ:
    app.conf.update(folder_broker.config(os.environ["STDLIB_INDEX_FOLDER"]))


def modules():
    """Return the paths of all modules of the standard library, with its tests where they are installed."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in stdlib.rglob("*.py")
        if not {"site-packages", "dist-packages"}.intersection(path.relative_to(stdlib).parts)
    )


def parse(path):
    """Return a module's syntax tree; None for one of those that are wrong on purpose, for Python's tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the code that is read
        try:
            return ast.parse(Path(path).read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            return None


@app.task
def index(paths):
    """Index these modules together and return what was found, in numbers."""
    trees = {path: parse(path) for path in paths}
    used = defaultdict(list)  # name: where it is used
    kinds = Counter()
    longest = (0, "")
    for path, tree in trees.items():
        if tree is None:
            kinds["unreadable"] += 1
            continue
        for node in ast.walk(tree):
            kinds["nodes"] += 1
            if isinstance(node, ast.Name):
                used[node.id].append((path, node.lineno))
            elif isinstance(node, ast.ClassDef):
                kinds["classes"] += 1
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kinds["functions"] += 1
                longest = max(longest, (node.end_lineno - node.lineno + 1, f"{Path(path).stem}.{node.name}"))
    kinds["modules"] = len(trees)
    kinds["uses of names"] = sum(map(len, used.values()))
    return {"counts": kinds, "longest function": longest}
