"""Which module may import what: the directions that keep the parts apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import memsafe_pool

PACKAGE = Path(memsafe_pool.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

#: Celery and the libraries it is made of.
CELERYS = {"billiard", "celery", "kombu", "vine"}

#: The modules that know nothing of Celery, so that they can be used and tested without it.
PURE = [
    "announce",
    "budget",
    "cgroups",
    "events",
    "gauge",
    "machine",
    "memory",
    "meter",
    "native",
    "native_ctypes",
    "neighbours",
    "pauses",
    "peaks",
    "probe",
    "reclaim",
    "recycle",
    "reservations",
    "rest",
    "rlimit",
    "room",
    "scheduler",
    "settings",
    "signals",
    "simulate",
    "state",
    "supervisor",
    "unseen",
    "watch",
    "wire",
]

#: The modules that decide: they are told what is, and say what to do.
DECIDING = [
    "budget",
    "events",
    "pauses",
    "recycle",
    "reservations",
    "rest",
    "room",
    "scheduler",
    "supervisor",
    "unseen",
]

#: The worker's side; a child has none of it.
WORKER_SIDE = {
    "announce",
    "budget",
    "crew",
    "engine",
    "fleet",
    "gauge",
    "job",
    "kernel_kills",
    "ledger",
    "link",
    "loop",
    "machine",
    "neighbours",
    "pauses",
    "peaks",
    "prefetch",
    "prefork",
    "recycle",
    "reservations",
    "rest",
    "room",
    "scheduler",
    "signals",
    "simulate",
    "sizes",
    "steward",
    "start",
    "start_forkserver",
    "supervisor",
    "time_limits",
    "unseen",
    "watch",
}

#: The modules that run in a child or in the process it is forked from.
CHILD_SIDE = ["child", "forkserver", "fresh", "meter"]

#: The one module that knows the inner parts of Celery and billiard.
UPSTREAM = "upstream"


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def is_for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node):
    """All nodes that run, at import or later; what is only for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if not is_for_types_only(child):
            yield child
            yield from statements(child)


def imported(module):
    """Each ``(module, name or None)`` that this module imports, wherever in it."""
    for node in statements(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                yield node.module, alias.name


def own_imports(module):
    """The package's modules that this one imports."""
    found = set()
    for source, name in imported(module):
        if source == "memsafe_pool":
            found.add(name)
        elif source.startswith("memsafe_pool."):
            found.add(source.split(".")[1])
    return found & set(MODULES)


def reach(module):
    """The package's modules that come along with this one."""
    found, todo = set(), [module]
    while todo:
        for other in own_imports(todo.pop()) - found:
            found.add(other)
            todo.append(other)
    return found


def external(module):
    return {source.partition(".")[0] for source, _ in imported(module)}


def test_the_lists_name_modules_that_exist():
    """A module that was renamed must be renamed here, too."""
    assert {*PURE, *WORKER_SIDE, *CHILD_SIDE, UPSTREAM} <= set(MODULES)


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_without_celery(module):
    """Neither they nor what they import need Celery, billiard or kombu."""
    for one in {module, *reach(module)}:
        assert not external(one) & CELERYS, one


@pytest.mark.parametrize("module", CHILD_SIDE)
def test_a_child_has_nothing_of_the_workers_side(module):
    """Neither directly nor by way of others."""
    assert not reach(module) & WORKER_SIDE


@pytest.mark.parametrize("module", DECIDING)
def test_what_decides_does_no_io(module):
    """Neither it nor what it imports: no clock, no files, no processes, no log."""
    allowed = {"__future__", "collections", "dataclasses", "itertools", "math", "memsafe_pool", "typing"}
    for one in {module, *reach(module)}:
        assert external(one) <= allowed, one


@pytest.mark.parametrize("module", MODULES)
def test_inner_parts_of_celery_are_in_one_place(module):
    """Billiard, and private names of Celery and kombu, are imported by one module alone."""
    if module == UPSTREAM:
        return
    for source, name in imported(module):
        if source.partition(".")[0] not in CELERYS:
            continue
        assert not source.startswith("billiard"), f"{module} imports {source}"
        parts = [*source.split("."), *([name] if name else [])]
        assert not any(part.startswith("_") for part in parts), f"{module} imports {'.'.join(parts)}"


#: Private attributes of others that may be used everywhere: Python's own, and done without where missing.
NAMEDTUPLE_METHODS = {"_asdict", "_replace"}
KNOWN_ATTRIBUTES = {("os", "_exit"), ("sys", "_current_frames"), ("sys", "_getframe")}


@pytest.mark.parametrize("module", MODULES)
def test_private_attributes_are_ones_own(module):
    """``something._name`` is used on ``self`` only: what belongs to others has no private name here."""
    if module == UPSTREAM:
        return
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if node.attr in NAMEDTUPLE_METHODS:
            continue
        owner = ast.unparse(node.value)
        if owner in ("self", "cls") or owner.startswith("self.") or (owner, node.attr) in KNOWN_ATTRIBUTES:
            continue
        raise AssertionError(f"{module}.py, line {node.lineno}: {owner}.{node.attr}")


@pytest.mark.parametrize("module", ["__init__", "cli"])
def test_what_every_command_imports_is_light(module):
    """The plug-in is imported by every ``celery`` command: nothing of the pool comes along."""
    at_import = {
        node
        for top in tree(module).body
        if isinstance(top, (ast.Import, ast.ImportFrom))
        for node in ast.walk(top)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    for node in at_import:
        assert "memsafe_pool" not in ast.unparse(node)


def test_no_circle():
    """No module comes along with itself."""
    for module in MODULES:
        assert module not in reach(module) or module == "__init__", module


@pytest.mark.parametrize("module", MODULES)
def test_each_module_says_what_it_is_and_what_it_gives(module):
    """A docstring, and ``__all__`` with names that exist."""
    parsed = tree(module)
    assert ast.get_docstring(parsed)
    [names] = [
        ast.literal_eval(node.value)
        for node in parsed.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    defined = {
        name.id
        for node in ast.walk(parsed)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    defined |= {node.name for node in ast.walk(parsed) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {
        alias.asname or alias.name
        for node in ast.walk(parsed)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert set(names) <= defined
