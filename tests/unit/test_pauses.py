"""Which running tasks are stopped for a while, sample by sample."""

from __future__ import annotations

from memsafe_pool.pauses import (
    HOPELESS_SECONDS,
    LONGEST,
    LONGEST_PAUSED,
    SHORTEST,
    STUCK_SECONDS,
    Pauses,
    Sample,
)
from memsafe_pool.reservations import UNKNOWN, Estimate

MIB = 1 << 20
LIMIT = 1000 * MIB
LEAST = 10 * MIB


class Watch:
    """Takes samples of tasks that are named by letters, the oldest first."""

    def __init__(self, **reserved):
        self.pauses = Pauses(2)
        self.now = 100.0
        self.estimates = {
            name: UNKNOWN if size is None else Estimate(size * MIB, size * MIB, known=True)
            for name, size in reserved.items()
        }

    @property
    def paused(self):
        return [name for name in self.estimates if self.pauses.is_paused(name)]

    def look(self, headroom, after=0.01, spared="", resting="", *, uncertain=0, known=None, **grown):
        """What is decided when so many MiB are left, perhaps more, and the tasks have taken so many.

        Arguments:
            known: What is known besides, where that is to be told from what is not known.
        """
        self.now += after
        samples = [
            Sample(
                name,
                self.estimates[name],
                int(size * MIB),
                spared=name == spared,
                resting=name in resting,
            )
            for name, size in grown.items()
        ]
        return self.pauses.decide(
            self.now,
            headroom * MIB,
            LIMIT,
            samples,
            uncertain=uncertain * MIB,
            unknown=None if known is None else LIMIT - (headroom + known + sum(grown.values())) * MIB,
        )


def test_nothing_is_done_while_all_fits():
    """Tasks may grow as fast as they like."""
    watch = Watch(a=100, b=100)
    watch.look(900, a=0, b=0)
    decision = watch.look(700, a=100, b=100)
    assert decision.stop == decision.go_on == []
    assert decision.growing == {"a", "b"}
    assert not watch.paused


def test_what_nobody_takes_is_no_reason_to_stop_anybody():
    """A large reservation is only a number as long as no task grows."""
    watch = Watch(a=500, b=900)
    watch.look(400, a=100, b=10)
    watch.look(400, a=100, b=10, after=5)
    assert watch.look(400, a=100, b=10).stop == []


def test_the_newest_stops_first():
    """As many as it takes, so that the older ones can finish."""
    watch = Watch(a=200, b=200, c=200)
    watch.look(600, a=0, b=0, c=0)
    assert watch.look(450, a=50, b=50, c=50).stop == ["c"]
    assert watch.pauses.is_paused("c")
    assert watch.look(350, a=100, b=100, c=50).stop == []


def test_one_that_needs_nothing_more_is_not_stopped():
    """It has all it wants, and will end."""
    watch = Watch(a=400, b=100)
    watch.look(300, a=0, b=100)
    assert watch.look(280, a=20, b=100).stop == []


def test_the_leader_goes_on_until_the_limit_is_near():
    """The oldest that still takes something: when it ends, its memory comes back."""
    watch = Watch(a=300, b=300)
    watch.look(400, a=0, b=0)
    assert watch.look(300, a=50, b=50).stop == ["b"]
    assert watch.look(100, a=200, b=50, after=0.2).stop == []
    assert watch.look(15, a=285, b=50, after=2).stop == []
    assert watch.look(10, a=290, b=50, after=0.2).stop == ["a"]


def test_what_may_be_taken_back_is_room_for_the_leader_alone():
    """The others wait until it was; and all do when it is not enough, so that one has to be ended."""
    watch = Watch(a=300, b=300)
    watch.look(100, uncertain=60, a=0, b=0)
    assert watch.look(20, uncertain=60, a=40, b=40).stop == ["b"]
    assert watch.look(5, uncertain=60, a=55, b=40, after=0.2).stop == []
    assert watch.look(-40, uncertain=60, a=100, b=40).stop == ["a"]
    assert watch.look(-40, uncertain=60, a=100, b=40).go_on == []
    assert watch.look(-40, uncertain=60, a=100, b=40, after=STUCK_SECONDS).stuck
    assert watch.look(-40, uncertain=140, a=100, b=40).go_on == ["a"]
    assert watch.paused == ["b"]


def test_one_that_is_spared_is_not_stopped():
    """Another one is in its place, and it when it is not spared any more."""
    watch = Watch(a=200, b=200, c=200)
    watch.look(600, a=0, b=0, c=0)
    assert watch.look(450, spared="c", a=50, b=50, c=50).stop == ["b"]
    watch.look(250, spared="c", a=100, b=50, c=150)
    assert watch.paused == ["b"]
    assert watch.look(110, a=110, b=50, c=180).stop == ["c"]


def test_the_oldest_goes_on_first_and_nobody_passes():
    """When what it needs fits again; one that would fit waits behind one that does not."""
    watch = Watch(a=300, b=300, c=10)
    watch.look(400, a=0, b=0, c=0)
    assert watch.look(250, a=75, b=70, c=5).stop == ["c", "b"]
    assert watch.look(250, a=75, b=70, c=5, after=0.5).go_on == []
    assert watch.look(800, a=75, b=70, c=5, after=0.5).go_on == ["b", "c"]
    assert not watch.paused


def test_those_that_may_be_large_go_on_one_by_one():
    """Stopped while they were small, of a kind of which one was large: each shows first what it needs."""
    watch = Watch(a=20, b=20, c=20)
    for name in "bc":
        watch.estimates[name] = Estimate(20 * MIB, 280 * MIB, known=True, ended=280 * MIB)
    watch.look(60, a=0, b=0, c=0)
    assert watch.look(50, a=10, b=5, c=5).stop == ["c", "b"]
    assert watch.look(500, a=20, b=5, c=5, after=0.5).go_on == ["b"]
    assert watch.look(400, a=20, b=105, c=5).go_on == []
    assert watch.look(325, a=20, b=180, c=5, after=0.1).go_on == []
    assert watch.look(490, a=20, b=20, c=5, after=2).go_on == ["c"]


def test_a_leader_goes_on_as_soon_as_there_is_a_little():
    """More than is never used, and than it can take until the next look, however much it still needs."""
    watch = Watch(a=None)
    watch.look(60, a=500)
    watch.look(LEAST // MIB, a=550, after=3)
    assert watch.pauses.is_paused("a")
    assert watch.look(LEAST // MIB, a=550).go_on == []
    assert watch.look(LEAST // MIB + 1, a=550).go_on == ["a"]


def test_stuck_is_when_all_are_paused_for_a_while():
    """What has just ended may still be giving its memory back."""
    watch = Watch(a=None)
    watch.look(60, a=500)
    assert not watch.look(9, a=551).stuck
    assert not watch.look(9, a=551, after=STUCK_SECONDS / 2).stuck
    assert watch.look(9, a=551, after=0.51 * STUCK_SECONDS).stuck
    assert not watch.look(500, a=551).stuck


def test_nobody_is_stuck_without_a_task():
    """An idle pool has nothing to end."""
    watch = Watch()
    watch.look(0)
    assert not watch.look(0, after=10).stuck


def test_an_unknown_task_may_double():
    """Two that have grown alike do not both get what is left."""
    watch = Watch(a=None, b=None)
    watch.look(900, a=0, b=0)
    assert watch.look(300, a=150, b=150, after=0.1).stop == ["b"]


def test_slow_growth_counts_when_little_is_left():
    """Many tasks that each take a little fill a container as one does that takes much."""
    names = "abcdefghij"
    watch = Watch(**dict.fromkeys(names))
    grown, headroom, stopped = 10.0, 400.0, []
    while len(stopped) < len(names) and headroom > 0:
        running = len(names) - len(stopped)
        grown += 2 * 0.1
        headroom -= 2 * 0.1 * running
        stopped += watch.look(headroom, after=0.1, **dict.fromkeys(names, grown)).stop
    assert headroom > 0
    assert set(stopped) == set(names)


def test_steady_tasks_end_even_where_little_is_left():
    """Those that do not grow are not stopped, whatever is left."""
    watch = Watch(a=None, b=100)
    for headroom in 900, 100, 10, 1:
        assert watch.look(headroom, a=50, b=100, after=10).stop == []


def test_what_has_ended_is_forgotten():
    """And whether it was paused is told, as it has to be let go on to end."""
    watch = Watch(a=None, b=None)
    watch.look(900, a=0, b=0)
    watch.look(300, a=150, b=150, after=0.1)
    assert watch.pauses.forget("b")
    assert not watch.pauses.forget("a")
    assert not watch.pauses.forget("a")
    assert not watch.paused


def test_the_next_sample_comes_the_sooner_the_less_is_left():
    """Between the shortest and the longest time."""
    watch = Watch(a=900)
    waits = [watch.look(headroom, a=0).wait for headroom in (100_000, 900, 300, 50, 0)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] == LONGEST
    assert waits[-1] == SHORTEST


def test_steady_tasks_are_looked_at_less_often():
    """They have what they need, and begin slowly if they do begin to grow."""
    watch = Watch(a=10)
    watch.look(500, a=10)
    watch.look(500, a=10, after=1)
    steady = watch.look(500, a=10, after=5).wait
    assert steady > 5 * watch.look(500, a=100, after=0.1).wait


def test_while_one_is_paused_it_is_looked_at_often():
    """So that it goes on as soon as there is room."""
    watch = Watch(a=None, b=None)
    watch.look(900, a=0, b=0)
    watch.look(300, a=150, b=150, after=0.1)
    assert watch.look(290, a=150, b=150, after=5).wait <= LONGEST_PAUSED


def test_what_was_taken_before_the_first_sample_is_no_speed():
    """A task is not faster than a core, so that it does not count as growing for long."""
    watch = Watch(a=None)
    assert watch.look(500, a=300).growing == {"a"}
    assert watch.look(500, a=300, after=3).growing == set()


def test_a_fast_leader_goes_on_only_where_it_can_be_stopped_again():
    """Before the next sample it can take what a core can touch in that time."""
    watch = Watch(a=None)
    step = 0.005 * 4e9 / MIB
    watch.look(200, a=0)
    watch.look(200 - step, after=0.005, a=step)
    watch.look(20, after=0.1, a=180)
    assert watch.pauses.is_paused("a")
    samples = [Sample("a", UNKNOWN, 180 * MIB)]
    least = 4 * MIB  # of a limit of 200 MiB
    assert watch.pauses.decide(watch.now + 1, least + 12 * MIB, 200 * MIB, samples).go_on == []
    assert watch.pauses.decide(watch.now + 2, least + 20 * MIB, 200 * MIB, samples).go_on == ["a"]


def test_one_that_rests_holds_nobody_up():
    """It may wait for a lock that the paused one has."""
    watch = Watch(a=300, b=100)
    watch.look(450, a=0, b=50)
    assert watch.look(390, a=0, b=110).stop == ["b"]
    assert watch.look(390, a=0, b=110, after=60).go_on == []
    assert watch.look(390, a=0, b=110, resting="a").go_on == ["b"]
    assert watch.look(130, a=0, b=370, resting="a", after=1).stop == []


def test_one_that_has_rested_is_the_last_of_the_line():
    """Who went on meanwhile is to end first: both grow into what only one of them can have."""
    watch = Watch(a=300, b=300)
    watch.look(400, a=0, b=0)
    watch.look(300, a=0, b=100, resting="a")
    assert watch.look(250, a=40, b=110).stop == ["a"]
    assert watch.look(110, a=40, b=250, after=1).go_on == []
    assert watch.look(360, a=40, after=1).go_on == ["a"]


def test_the_line_is_as_it_was_when_all_have_ended():
    """Nothing is remembered of those that rested."""
    watch = Watch(a=300, b=300)
    watch.look(400, a=0, b=0, resting="a")
    watch.look(400, a=0, b=0)
    watch.pauses.forget("a")
    watch.pauses.forget("b")
    watch.look(400, a=0, b=0)
    assert watch.look(300, a=50, b=50).stop == ["b"]


def test_any_may_have_what_nobody_is_known_to_have():
    """Files in memory, for instance: the oldest goes on and deletes its own, the newest stop first."""
    watch = Watch(a=0, b=0, c=0)
    watch.look(600, known=100, a=0, b=0, c=0)
    assert watch.look(500, known=100, a=0, b=0, c=0).stop == []
    assert watch.look(400, known=100, a=0, b=0, c=0).stop == ["c", "b"]
    assert watch.look(150, known=100, a=0, b=0, c=0, after=0.1).stop == []
    assert watch.look(550, known=100, a=0, b=0, c=0, after=0.1).go_on == ["b", "c"]


def test_it_is_looked_at_twice():
    """Numbers may be older than they should be: the second time they are exact."""
    watch = Watch(a=0, b=0)
    watch.look(600, known=100, a=0, b=0)
    assert not watch.pauses.exact
    assert watch.look(200, known=100, a=0, b=0).stop == []
    assert watch.pauses.exact
    assert watch.look(600, known=100, a=0, b=0).stop == []
    assert not watch.pauses.exact


def test_what_children_and_tasks_have_is_known():
    watch = Watch(a=100, b=100)
    watch.look(600, known=100, a=0, b=0)
    watch.look(400, known=200, a=50, b=50)
    watch.look(200, known=300, a=100, b=100)
    assert not watch.paused


def test_what_does_not_grow_any_more_stops_nobody():
    watch = Watch(a=0, b=0)
    watch.look(600, known=100, a=0, b=0)
    for _ in range(3):
        watch.look(300, known=100, a=0, b=0, after=4)
    assert watch.look(250, known=150, a=0, b=0).stop == []
    assert not watch.paused


def test_one_goes_on_where_nobody_has_anything_to_give():
    """All that is used is in files, and perhaps somebody else deletes some; but not for ever."""
    watch = Watch(a=0, b=0)
    watch.look(600, known=100, a=0, b=0)
    for left in (300, 100, 0):
        watch.look(left, known=100, a=0, b=0)
    assert watch.paused == ["a", "b"]
    assert watch.look(0, known=100, a=0, b=0, after=HOPELESS_SECONDS).go_on == ["a"]
    watch.look(0, known=100, a=0, b=0)
    assert watch.paused == ["b"]


def test_how_soon_a_task_is_looked_at_of_which_little_is_expected():
    watch = Watch(a=0)
    watch.look(900, a=0)
    assert SHORTEST < watch.pauses.soon < 0.1
    watch.look(40, a=0)
    assert watch.pauses.soon == SHORTEST
