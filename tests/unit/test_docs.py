"""The documents against the code: settings, log lines, fields of stats, links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import memsafe_pool
from memsafe_pool.peaks import Summary
from memsafe_pool.settings import SETTINGS

PACKAGE = Path(memsafe_pool.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])

#: Functions whose text arguments end up in a log line, besides those of a logger.
SPEAKERS = {"fall_back", "start_failed", "on_hopeless", "_fail_waiting", "Retire", "StopWorker"}

#: What begins with memsafe_ and is no setting: the package, and what can be said of a task.
OTHER_NAMES = {
    "memsafe_pool",
    "memsafe_hard_limit",
    "memsafe_key",
    "memsafe_memory",
    "memsafe_soft_limit",
}


def text(name):
    """A document of ``docs``, with single spaces."""
    return " ".join((ROOT / "docs" / name).read_text().split())


def modules():
    return [(path.stem, ast.parse(path.read_text())) for path in sorted(PACKAGE.glob("*.py"))]


def called(node):
    """The name of what is called, and whether it is a method of a logger."""
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return node.func.attr, isinstance(owner, ast.Name) and owner.id == "logger"
    return (node.func.id, False) if isinstance(node.func, ast.Name) else ("", False)


def fixed_parts(node):
    """The parts of a call's texts that are the same each time."""
    for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
        for part in ast.walk(argument):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield from re.split(r"%[rsdg]", part.value)


def log_lines():
    """Each fixed part of a log line, with where it is."""
    found = []
    for name, module in modules():
        for node in ast.walk(module):
            if isinstance(node, ast.Call):
                function, logs = called(node)
                if logs or function in SPEAKERS:
                    parts = (part.strip(" \n:.") for part in fixed_parts(node))
                    found += [(name, node.lineno, part) for part in parts if len(part) > 3]
    return found


def keys(function, module="prefork"):
    """The keys of all dicts that a function of a module writes down."""
    module = ast.parse((PACKAGE / f"{module}.py").read_text())
    [node] = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.name == function]
    dicts = [part for part in ast.walk(node) if isinstance(part, ast.Dict)]
    return [key.value for found in dicts for key in found.keys if isinstance(key, ast.Constant)]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_is_documented_with_its_default(setting):
    """The reference has a section and a table row for each declared setting; the README names it."""
    reference = text("reference/settings.md")
    row = f"| [`{setting.name}`](#{setting.name}) | `{setting.default!r}` | {setting.accepted} |"
    assert row in reference
    assert f"## {setting.name} " in reference
    assert f"| `{setting.name}` |" in (ROOT / "README.md").read_text()


def test_no_document_names_a_setting_that_does_not_exist():
    """What is called ``memsafe_...`` or ``MEMSAFE_...`` in a document is declared."""
    declared = {setting.name for setting in SETTINGS} | OTHER_NAMES
    for path in DOCUMENTS:
        names = {name.lower() for name in re.findall(r"\b(?:memsafe|MEMSAFE)_\w+", path.read_text())}
        unknown = {name for name in names - declared if not name.startswith("memsafe_test_")}
        assert not unknown, path


def test_each_log_line_is_documented():
    """What the pool can log, but for names and numbers, stands in the reference."""
    reference = text("reference/log-lines.md")
    lines = log_lines()
    assert len(lines) > 20
    missing = [(*where, part) for *where, part in lines if " ".join(part.split()) not in reference]
    assert missing == []


def test_each_field_of_stats_is_documented():
    """Each key that ``inspect stats`` has under ``pool`` stands in the reference, in code type."""
    reference = text("reference/stats.md")
    fields = [
        *keys("_get_info"),
        *keys("_writes"),
        *keys("_memory"),
        *keys("_row", "ledger"),
        *Summary.__annotations__,
    ]
    assert "max-concurrency" in fields
    # Those of "inqueues" are the last two of their table row.
    names = re.findall(r"`(?:writes\.)?([\w-]+)`", reference)
    assert set(fields) - {"memsafe", "writes"} <= set(names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """A relative link names a file of the project and, after ``#``, a heading in it."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.is_file(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target
