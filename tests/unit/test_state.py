"""The file that keeps what tasks needed: whole or not at all, shared, and safe in a folder of others."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
from celery import Celery

from memsafe_pool import state
from memsafe_pool.sizes import Sizes

MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "needs.json")


def row(name, label=None, most=MIB):
    return {"name": name, "label": label, "count": 1, "recent": [most], "most": most}


def files(path):
    return sorted(os.listdir(os.path.dirname(path)))


def learned(path):
    """What a worker finds that starts now: the largest peak of each name."""
    return {row["name"]: row["most"] for row in state.read(path)}


def test_rows_take_the_place_of_their_like(path):
    """All others stay; those changed last are last."""
    state.update(path, [row("a"), row("b"), row("b", "large")])
    state.update(path, [row("b", most=2 * MIB), row("c")])
    assert state.read(path) == [row("a"), row("b", "large"), row("b", most=2 * MIB), row("c")]
    assert files(path) == ["needs.json"]


def test_there_is_an_end_to_rows(path, monkeypatch):
    monkeypatch.setattr(state, "MOST_ROWS", 2)
    state.update(path, [row("a"), row("b")])
    state.update(path, [row("c")])
    assert [kept["name"] for kept in state.read(path)] == ["b", "c"]


def test_writers_at_the_same_time(path, monkeypatch):
    """Whatever their pids are, as in two containers: the file is always whole, and has the rows of all."""
    monkeypatch.setattr(state, "WAIT_SECONDS", 60)
    state.update(path, [row("first")])

    def write(name):
        for number in range(40):
            state.update(path, [row(f"{name}{number}")])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert state.read(path)[0] == row("first")
    assert len(state.read(path)) == 1 + 3 * 40
    assert files(path) == ["needs.json"]


def test_a_lock_that_somebody_keeps(path, monkeypatch):
    """It is written all the same: nobody waits for one who was stopped."""
    monkeypatch.setattr(state, "WAIT_SECONDS", 0.05)
    with state._locked(os.path.dirname(path)):
        state.update(path, [row("a")])
    assert learned(path) == {"a": MIB}


def test_what_fails_leaves_nothing(path):
    """The file is as it was, and no other is there."""
    state.update(path, [row("a")])
    with pytest.raises(TypeError):
        state.update(path, [row("b", most=object())])
    assert learned(path) == {"a": MIB}
    assert files(path) == ["needs.json"]
    with pytest.raises(OSError, match="No such file"):
        state.update(f"{path}.d/needs.json", [row("a")])


def test_no_link_is_followed(path, tmp_path):
    """A link in the place of the file, or in that of a new one, is not written through."""
    other = tmp_path / "other"
    other.write_text("precious")
    os.symlink(other, path)
    os.symlink(other, f"{path}.{os.getpid()}")  # a name that can be foretold
    state.update(path, [row("a")])
    assert other.read_text() == "precious"
    assert not os.path.islink(path)
    assert learned(path) == {"a": MIB}


def test_the_mode_is_kept(path):
    """At first the umask has it; what somebody has changed stays."""
    umask = os.umask(0o027)
    try:
        state.update(path, [row("a")])
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
        os.chmod(path, 0o664)
        state.update(path, [row("b")])
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o664
    finally:
        os.umask(umask)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "[" * 100_000, '"' + "x" * 10])
def test_what_is_none(path, text):
    """Whatever somebody else has written is a ValueError; nobody waits for the other end of a pipe."""
    with open(path, "w") as file:
        file.write(text)
    with pytest.raises(ValueError, match=r".+"):
        state.read(path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        state.read(path)


# Of workers


@pytest.fixture
def app():
    made = Celery("state", broker="memory://", set_as_current=False)
    yield made
    made.close()


def test_workers_share_a_file(app, path):
    """What each has learned is kept; nobody writes what it has only read."""
    state.update(path, [row("old", most=50 * MIB), row("both", most=50 * MIB)])
    one, other = Sizes(app, path), Sizes(app, path)
    one.learned.learn("of one", None, 20 * MIB)
    one.learned.learn("old", None, 60 * MIB)
    other.learned.learn("of other", None, 30 * MIB)
    other.learned.learn("both", None, 70 * MIB)
    one.save()
    other.save()
    both = {"of one": 20 * MIB, "of other": 30 * MIB, "old": 60 * MIB, "both": 70 * MIB}
    assert learned(path) == both
    next_one = Sizes(app, path).learned
    assert {name: next_one.estimate(name, None).known for name in both} == dict.fromkeys(both, True)
    os.unlink(path)
    one.save()  # nothing new
    assert not os.path.exists(path)


def test_a_file_that_cannot_be_written_is_said_once(app, tmp_path, caplog):
    """Until it could be written in between."""
    folder = tmp_path / "volume"
    sizes = Sizes(app, str(folder / "needs.json"))

    def save():
        sizes.learned.learn("work", None, 20 * MIB)
        sizes.save()
        return len(caplog.messages)

    assert (save(), save()) == (1, 1)
    assert "could not be written" in caplog.text
    folder.mkdir()
    assert save() == 1
    assert json.loads((folder / "needs.json").read_text())[0]["count"] == 3
    (folder / "needs.json").unlink()
    folder.rmdir()
    assert save() == 2
