"""The worker's record of its children."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool.fleet import Child, Fleet, State


class NoSocket:
    """Stands for the worker's end of a socket: nothing is sent here."""

    def setblocking(self, flag):
        pass


STATES = [State.IDLE, State.BUSY, State.LEAVING, State.GONE]


def add(fleet, name="child"):
    child = Child(name, fleet.free_index(), NoSocket(), born=0.0, generation=0, start_method="spawn")
    fleet.add(child)
    return child


def ready(fleet, child):
    """As the engine does when a child comes up and has nothing to do."""
    fleet.starting_children.discard(child)
    child.state = State.IDLE
    fleet.idle.append(child)


def counts(fleet):
    return fleet.size, fleet.starting, len(fleet.idle), fleet.busy, fleet.leaving


def test_a_childs_life():
    """Starting, idle, busy, leaving, gone: counted in one place at a time."""
    fleet = Fleet()
    child = add(fleet)
    assert counts(fleet) == (1, 1, 0, 0, 0)
    ready(fleet, child)
    assert counts(fleet) == (1, 0, 1, 0, 0)
    assert fleet.idle.pop() is child
    child.state = State.BUSY
    assert counts(fleet) == (1, 0, 0, 1, 0)
    fleet.move(child, State.LEAVING)
    assert counts(fleet) == (1, 0, 0, 0, 1)
    fleet.move(child, State.GONE)
    assert counts(fleet) == (0, 0, 0, 0, 0)
    assert not fleet.children


def test_leaving_twice_is_leaving_once():
    """A child that was told to go and is then made to go counts once."""
    fleet = Fleet()
    child = add(fleet)
    fleet.move(child, State.LEAVING)
    fleet.move(child, State.LEAVING)
    assert counts(fleet) == (1, 0, 0, 0, 1)


def test_the_lowest_free_slot_is_taken():
    """Slots are taken up again from below, so that log files by slot do not multiply."""
    fleet = Fleet()
    children = [add(fleet) for _ in range(4)]
    assert [child.index for child in children] == [0, 1, 2, 3]
    fleet.move(children[2], State.GONE)
    fleet.move(children[1], State.LEAVING)  # it still has its slot
    assert fleet.free_index() == 2
    fleet.move(children[0], State.GONE)
    assert fleet.free_index() == 0


def test_a_pid_that_is_used_again():
    """The record of a child that is gone does not take the pid from the one that has it now."""
    fleet = Fleet()
    old, new = add(fleet), add(fleet)
    old.pid = new.pid = 77
    fleet.by_pid[77] = new
    fleet.move(old, State.GONE)
    assert fleet.by_pid == {77: new}
    fleet.move(new, State.GONE)
    assert fleet.by_pid == {}


def test_a_child_names_itself():
    """Name, pid, state and tasks are what a log line shows."""
    fleet = Fleet()
    child = add(fleet, "ForkServerPoolWorker-7")
    assert repr(child) == "ForkServerPoolWorker-7 (pid ?, starting, 0 tasks)"
    child.pid, child.tasks, child.state = 42, 3, State.IDLE
    assert repr(child) == "ForkServerPoolWorker-7 (pid 42, idle, 3 tasks)"


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(STATES)), max_size=40))
def test_each_child_is_counted_once(moves):
    """After any moves the counts are those of the states, and add up to the size."""
    fleet = Fleet()
    children = [add(fleet) for _ in range(6)]
    for number, state in moves:
        child = children[number]
        if child.state is State.GONE or (child.state is State.LEAVING and state is not State.GONE):
            continue
        if state is child.state:
            continue
        if child.state is State.STARTING and state is State.IDLE:
            ready(fleet, child)
        elif child.state is State.IDLE and state is State.BUSY:
            fleet.idle.remove(child)
            child.state = State.BUSY
        elif child.state is State.BUSY and state is State.IDLE:
            child.state = State.IDLE
            fleet.idle.append(child)
        elif state in (State.LEAVING, State.GONE):
            fleet.move(child, state)
        states = [child.state for child in children]
        assert counts(fleet) == (
            6 - states.count(State.GONE),
            states.count(State.STARTING),
            states.count(State.IDLE),
            states.count(State.BUSY),
            states.count(State.LEAVING),
        )
        assert all(child.state is State.IDLE for child in fleet.idle)
    alive = [child for child in children if child.state is not State.GONE]
    assert fleet.children == set(alive)
    assert len({child.index for child in alive}) == len(alive)
    assert fleet.free_index() not in {child.index for child in alive}
