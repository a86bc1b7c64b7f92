"""Workers that share a limit, as real processes: what they see of each other, and what is left of them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
from harness import trees
from harness.residue import descriptors
from harness.trees import tree
from harness.waiting import DEADLINE, until
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool import neighbours as module
from memsafe_pool.neighbours import MAX_SLOTS, Neighbours, key
from memsafe_pool.probe import Probe

#: Carries out the lines it is given, each answered by one.
OTHER = """
import os, sys
from memsafe_pool.neighbours import Neighbours

it = Neighbours("k", folder=sys.argv[1])
held = None
print("up", flush=True)
for line in sys.stdin:
    word, _, number = line.strip().partition(" ")
    answer = "ok"
    if word == "publish":
        it.publish(int(number))
    elif word == "others":
        answer = it.others()
    elif word == "alone":
        answer = int(it.alone)
    elif word == "turn":
        held = it.turn(10.0)
        answer = held.__enter__()
    elif word == "end":
        held.__exit__(None, None, None)
    elif word == "close":
        it.close()
    elif word == "spend":
        # Spend one of 1000 if that many are free, again and again.
        mine = 0
        for _ in range(int(number)):
            with it.turn(10.0) as others:
                if mine + others < 1000:
                    mine += 1
                    it.publish(mine)
        answer = mine
    print(answer, flush=True)
"""


class Other:
    """Another worker."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "up\n"

    def send(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self):
        text = self.process.stdout.readline().strip()
        return int(text) if text.isdigit() else text

    def ask(self, line):
        self.send(line)
        return self.answer()

    def kill(self):
        self.process.kill()
        self.process.wait(DEADLINE)

    def end(self):
        self.process.kill()
        self.process.wait(DEADLINE)
        self.process.stdin.close()
        self.process.stdout.close()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


@pytest.fixture
def other(folder):
    """``other()``: one more worker."""
    made = []

    def start():
        made.append(Other(folder))
        return made[-1]

    yield start
    for each in made:
        each.end()


@pytest.fixture
def own(folder):
    """``own()``: our side; its clock stands still."""
    made = []

    def make(**arguments):
        warnings = []
        found = Neighbours("k", folder=folder, on_warning=warnings.append, clock=Clock(), **arguments)
        found.warnings, found.clock = warnings, found._clock
        made.append(found)
        return found

    yield make
    for each in made:
        each.close()


def files(folder):
    return os.listdir(folder)


def test_alone(own, folder):
    """Nobody else: nothing is reserved by others, and no file is left."""
    it = own()
    it.publish(100)
    assert it.others() == 0
    assert it.alone
    with it.turn() as others:
        assert others == 0
        it.publish(200)
    assert it.others() == 0
    it.close()
    assert files(folder) == []
    assert it.warnings == []


def test_the_file_is_ours_alone(own):
    """Nobody else may read or write it."""
    found = os.stat(own().path)
    assert stat.S_IMODE(found.st_mode) == 0o600


def test_two_workers(own, other, folder):
    """Each sees what the other has, and when that changes; the last one removes the file."""
    it, one = own(), other()
    one.ask("publish 1000")
    it.publish(30)
    assert it.others() == 1000
    assert one.ask("others") == 30
    assert not it.alone
    one.ask("publish 0")
    assert it.others() == 0
    assert not it.alone
    one.ask("close")
    assert it.others() == 0
    assert it.alone
    assert len(files(folder)) == 1
    it.close()
    assert files(folder) == []


def test_three_workers(own, other, folder):
    """The sum of all others; a slot that was left is taken by the next one."""
    it, one, two = own(), other(), other()
    one.ask("publish 1")
    two.ask("publish 10")
    it.publish(100)
    assert [it.others(), one.ask("others"), two.ask("others")] == [11, 110, 101]
    size = os.stat(it.path).st_size
    one.ask("close")
    three = other()
    three.ask("publish 1000")
    assert [it.others(), two.ask("others"), three.ask("others")] == [1010, 1100, 110]
    assert os.stat(it.path).st_size == size
    it.close()
    two.ask("close")
    three.ask("close")
    assert files(folder) == []


def test_what_cannot_be_a_number_of_bytes(own, other):
    """Less than nothing is nothing; more than fits is as much as fits."""
    it, one = own(), other()
    it.publish(-5)
    assert one.ask("others") == 0
    it.publish(1 << 70)
    assert one.ask("others") == (1 << 64) - 1


def test_a_turn_is_for_one(own, other):
    """While one has the turn the other waits for it, and then sees what was published in it."""
    it, one = own(), other()
    with it.turn() as others:
        assert others == 0
        one.send("turn")
        it.publish(77)
    assert one.answer() == 77
    one.ask("end")


def test_a_turn_that_does_not_come(own, other):
    """After the wait it goes on with what is known, and for a second does not wait again."""
    it, one = own(), other()
    one.ask("publish 5")
    one.ask("turn")
    with it.turn(0.05) as others:
        assert others == 5
    with it.turn(3600) as others:
        assert others == 5
    assert it.others() == 5
    one.ask("end")
    with it.turn() as others:
        one.send("turn")
        it.publish(6)
    assert one.answer() == 6


def test_an_error_in_a_turn_ends_it(own, other):
    """It does not stay ours."""
    it, one = own(), other()
    with pytest.raises(ZeroDivisionError), it.turn():
        raise ZeroDivisionError
    assert one.ask("turn") == 0


def test_never_more_than_there_is(other):
    """Four workers that spend at the same time: all of it, and nothing twice."""
    workers = [other() for _ in range(4)]
    for each in workers:
        each.send("spend 400")
    assert sum(each.answer() for each in workers) == 1000


def test_a_killed_worker_does_not_count(own, other, folder):
    """For a second at most; then its slot is free for the next."""
    it, one = own(), other()
    one.ask("publish 1000")
    assert it.others() == 1000
    one.kill()
    it.clock.now += 1.5
    assert it.others() == 0
    assert it.alone
    assert os.stat(it.path).st_size == 2 * module._SLOT.size
    two = other()
    two.ask("publish 3")
    assert it.others() == 3
    assert os.stat(it.path).st_size == 2 * module._SLOT.size
    two.kill()
    it.close()
    assert files(folder) == []


def test_killed_with_the_turn(own, other):
    """The kernel takes the turn from a process that ends."""
    it, one, two = own(), other(), other()
    one.ask("publish 1000")
    one.ask("turn")
    one.kill()
    it.clock.now += 1.5
    with it.turn() as others:
        assert others == 0
        two.send("turn")
        it.publish(4)
    assert two.answer() == 4


def test_stopped_with_the_turn(own, other):
    """A worker that is stopped is one that lives: what it has counts; we do without the turn."""
    it, one = own(), other()
    one.ask("publish 1000")
    one.ask("turn")
    os.kill(one.process.pid, signal.SIGSTOP)
    it.clock.now += 1.5
    with it.turn(0.02) as others:
        assert others == 1000
        it.publish(5)
    it.close()
    os.kill(one.process.pid, signal.SIGCONT)
    one.ask("end")
    assert one.ask("others") == 0


def test_a_file_that_all_left_by_being_killed(own, other):
    """The next worker finds it, and nobody in it."""
    for number in (1, 2, 3):
        one = other()
        one.ask(f"publish {number}")
        one.kill()
    it = own()
    assert it.others() == 0
    assert it.alone
    assert os.stat(it.path).st_size == module._SLOT.size


def test_files_that_killed_workers_left_under_another_limit(own, other, folder):
    """Nobody will come under that limit again: its cgroup is gone. What is in use stays."""
    one = other()
    one.ask("publish 1")
    path = os.path.join(folder, files(folder)[0])
    Neighbours("another", folder=folder).close()
    assert os.path.exists(path)
    one.kill()
    it = Neighbours("another", folder=folder)
    assert files(folder) == [os.path.basename(it.path)]
    it.close()
    assert files(folder) == []


def write(path, number, pid, size):
    """Write a slot, in another process: whoever closes a file gives up all locks his process has on it."""
    slot = module._SLOT.pack(pid, size).hex()
    at = number * module._SLOT.size
    code = f"import os; os.pwrite(os.open({path!r}, os.O_RDWR), bytes.fromhex({slot!r}), {at})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pid_that_was_used_again(own, other):
    """A dead worker's slot with the pid of one that lives, or with our own, is free."""
    it, one = own(), other()
    one.ask("publish 3")
    for pid in (os.getppid(), os.getpid(), one.process.pid):
        write(it.path, 2, pid, 500)
        assert it.others() == 503
        it.clock.now += 1.5
        assert it.others() == 3
    assert it.warnings == []


def test_a_slot_that_somebody_took(own, other):
    """What is not in our name is not ours: we join again."""
    it, one = own(), other()
    it.publish(9)
    write(it.path, 0, 4242, 1)
    it.clock.now += 1.5
    with it.turn():
        it.publish(10)
    assert one.ask("others") == 10


def test_locks_that_were_given_up(own, other):
    """By somebody in our process who opened and closed the file: ours are taken again within a second."""
    it, one = own(), other()
    it.publish(9)
    os.close(os.open(it.path, os.O_RDONLY))
    it.clock.now += 1.5
    with it.turn():
        pass
    one.ask("turn")
    one.ask("end")
    assert one.ask("others") == 9


def test_a_file_that_was_removed(own, other, folder):
    """By somebody who tidies up: all meet again in the next one."""
    it, one = own(), other()
    one.ask("publish 7")
    os.unlink(it.path)
    it.clock.now += 1.5
    with it.turn() as others:
        assert others == 0
        it.publish(3)
    assert len(files(folder)) == 1

    def met():
        with it.turn() as others:
            pass
        one.ask("turn")
        one.ask("end")
        return others == 7

    until(met, "both to be in the new file")
    assert one.ask("others") == 3


def test_joining_while_the_last_one_leaves(folder, other):
    """Many that come and go at once: all that are there at the end see each other."""
    stay = [other() for _ in range(2)]

    def come_and_go():
        for _ in range(3):
            one = Other(folder)
            one.ask("publish 1")
            one.ask("close")
            one.end()

    stay[0].ask("close")
    stay[1].ask("close")
    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(DEADLINE)
    assert files(folder) == []
    a, b = other(), other()
    a.ask("publish 1")
    assert b.ask("others") == 1


def test_a_forked_process_is_nobody(own, other):
    """A child of the worker neither speaks for it nor leaves for it."""
    it, one = own(), other()
    it.publish(9)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            it.publish(1000)
            with it.turn() as others:
                status = 2 if others or it.others() else 0
            it.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert one.ask("others") == 9
    assert one.ask("turn") == 9


def test_more_workers_than_slots(own, other, monkeypatch):
    """One too many does without, and says so."""
    monkeypatch.setattr(module, "MAX_SLOTS", 1)
    one = other()
    one.ask("publish 4")
    it = own()
    assert it.others() == 0
    it.publish(5)
    [warning] = it.warnings
    assert "cannot be used (1 workers are in it)" in warning
    assert MAX_SLOTS == 256
    assert one.ask("others") == 0


# Files that are not to be trusted, or not to be had


def link(path, folder):
    with open(folder + "/precious", "w") as file:
        file.write("precious")
    os.symlink(folder + "/precious", path)


def hard_link(path, folder):
    with open(folder + "/precious", "w") as file:
        file.write("precious")
    os.link(folder + "/precious", path)


def pipe(path, folder):
    os.mkfifo(path)


def directory(path, folder):
    os.mkdir(path)


def foreign(path, folder):
    with open(path, "w") as file:
        file.write("x" * 16)
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("put", [link, hard_link, pipe, directory, foreign])
def test_something_else_in_its_place(own, folder, put):
    """It is not touched; that is said once, and others are not seen."""
    if put is foreign and os.geteuid():
        pytest.skip("only root can make a file of somebody else")
    put(f"{folder}/memsafe-pool-{os.geteuid()}-k", folder)
    it = own()
    before = descriptors()
    for _ in range(3):
        it.publish(5)
        assert it.others() == 0
        with it.turn() as others:
            assert others == 0
        it.clock.now += 2
    it.close()
    [warning] = it.warnings
    assert warning.startswith(f"{folder}/memsafe-pool-")
    assert warning.endswith("what other workers under the same memory limit have reserved is not known")
    assert descriptors() == before
    if os.path.exists(folder + "/precious"):
        with open(folder + "/precious") as file:
            assert file.read() == "precious"


def test_no_folder(tmp_path):
    """The same; it is tried again later, and works when it can."""
    warnings, clock = [], Clock()
    it = Neighbours("k", folder=f"{tmp_path}/later", on_warning=warnings.append, clock=clock)
    assert it.others() == 0
    assert len(warnings) == 1
    assert not it.path.startswith("/dev")
    os.mkdir(f"{tmp_path}/later")
    with it.turn():
        assert not os.path.exists(it.path)
    clock.now += 2
    with it.turn():
        it.publish(5)
    assert os.path.exists(it.path)
    it.close()
    assert os.listdir(f"{tmp_path}/later") == []
    assert len(warnings) == 1


READ_ONLY = """
import os, sys
from memsafe_pool.neighbours import Neighbours

os.setuid(12345)
warnings = []
it = Neighbours("k", folder=sys.argv[1], on_warning=warnings.append)
it.publish(5)
with it.turn() as others:
    print(others, it.others(), it.alone, len(warnings), warnings[0].partition(" ")[2])
it.close()
"""


def test_a_read_only_folder(tmp_path):
    """One warning, and 0."""
    if os.geteuid():
        pytest.skip("only root can become somebody else, and root may write everywhere")
    os.chmod(tmp_path, 0o555)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and folder.name.startswith("pytest-"):
            os.chmod(folder, folder.stat().st_mode | 0o011)
    found = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert found.stdout == (
        "0 0 True 1 cannot be used (Permission denied): what other workers under the same memory limit have "
        "reserved is not known\n"
    )


@given(st.binary(max_size=200))
def test_whatever_is_in_the_file(tmp_path_factory, text):
    """It is nobody's, and so it is cleared away."""
    folder = str(tmp_path_factory.mktemp("n"))
    path = f"{folder}/memsafe-pool-{os.geteuid()}-k"
    with open(path, "wb") as file:
        file.write(text)
    warnings = []
    it = Neighbours("k", folder=folder, on_warning=warnings.append)
    it.publish(5)
    assert it.others() == 0
    assert it.alone
    it.close()
    assert os.listdir(folder) == []
    assert warnings == []


# Who is a neighbour


def test_the_place(monkeypatch):
    """Shared memory, whatever the environment says; the temporary folder where there is none."""
    assert module._folder() == "/dev/shm"
    monkeypatch.setattr(module, "_SHARED_MEMORY", "/nothing/here")
    assert module._folder() == module.tempfile.gettempdir()


def test_key(tmp_path):
    """The cgroup of the lowest limit, not our own one; the machine where that is the limit."""

    def found(name):
        folder = tmp_path / name
        folder.mkdir()
        return key(Probe(tree(folder, trees.ALL[name])).read())

    def of(path):
        status = os.stat(f"{tmp_path}{path}")
        return f"{status.st_dev:x}-{status.st_ino:x}"

    assert found("DOCKER_V1") == of("/DOCKER_V1/sys/fs/cgroup/memory")
    assert found("KUBERNETES_V2") == of("/KUBERNETES_V2/sys/fs/cgroup")
    assert found("UNLIMITED_V2") == "machine"
    assert found("WSL") == "machine"


def test_key_of_what_is_gone(tmp_path):
    """A cgroup that was removed since is no error."""
    reading = Probe(tree(tmp_path, trees.DOCKER_V2)).read()
    os.rename(tmp_path / "sys", tmp_path / "was")
    assert key(reading) == "machine"
