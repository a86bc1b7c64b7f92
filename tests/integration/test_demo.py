"""``examples/demo.py``, as a program: what it prints, how it ends, and that it leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from harness.waiting import until

pytestmark = pytest.mark.ours_only("the demo")

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"

#: In the environment of all processes of the demo; its value is the folder of the test.
TAG = "TEST_DEMO_FOLDER"


class Demo:
    """One run of the demo on a small sample."""

    def __init__(self, folder, *arguments, **env):
        self.folder, self.output_path = folder, folder.with_name(f"{folder.name}.txt")
        folder.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMSAFE_")}
        with open(self.output_path, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(DEMO), "--sample", "2e6", "-c", "2", "--idle-timeout", "1", *arguments],
                env={**kept, "TMPDIR": str(folder), TAG: str(folder), **env},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def output(self):
        return self.output_path.read_text()

    def wait_for_output(self, pattern):
        """Wait until the demo has printed this."""

        def printed():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output()}"
            return re.search(pattern, self.output())

        return until(printed, f"{pattern!r} in the output of the demo", timeout=120)

    def wait_exit(self):
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(150)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the demo did not end within 150 s:\n{self.output()}") from None

    def pids(self):
        """Return the pids of the demo and of all that it has started, wherever that is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TAG) == str(self.folder):
                    found.append(process.pid)
            except (psutil.Error, OSError):
                continue
        return found

    def check_nothing_left(self):
        assert self.pids() == []
        assert list(self.folder.iterdir()) == []

    def kill(self):
        while pids := self.pids():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.process.poll()


@pytest.fixture
def run_demo(tmp_path):
    """Start the demo, and end it with the test."""
    demos = []

    def run(*arguments, **env):
        demos.append(Demo(tmp_path / f"demo{len(demos)}", *arguments, **env))
        return demos[-1]

    yield run
    for demo in demos:
        demo.kill()
        demo.process.wait(30)


def test_demo_shows_children_that_come_and_go(run_demo):
    """The demo ends with exit code 0 and a table: no child when idle, less memory at the end than prefork."""
    demo = run_demo()
    assert demo.wait_exit() == 0, demo.output()
    output = demo.output()
    assert "--pool memsafe_pool:Pool -c 2" in output
    assert re.search(r"-- idle\n.* MB   no children\n", output), output
    assert re.search(r"(\d+) of \1 tasks .* MB   \d+ (busy|idle) [\d.]+", output), output
    assert re.search(r"children when idle, at work, at the end +0, 2, 0 +2, 2, 2\n", output), output
    assert re.search(r"tasks done, failed +(\d+), 0 +\1, 0\n", output), output
    ours, prefork = map(float, re.search(r"memory at the end +([\d.]+) MB +([\d.]+) MB", output).groups())
    assert ours < prefork
    assert re.search(r"index: \d+ modules, .* nodes, ", output), output
    demo.check_nothing_left()


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl+C", "SIGTERM"]
)
def test_interrupted_demo_cleans_up(run_demo, number, exit_code):
    """A demo that is stopped while its worker has children ends them and removes its folder."""
    demo = run_demo("--idle-timeout", "600")
    demo.wait_for_output(r"-- idle again\n.* idle ")
    demo.process.send_signal(number)
    assert demo.wait_exit() == exit_code, demo.output()
    demo.check_nothing_left()


def test_failed_demo_shows_the_log(run_demo):
    """When the worker does not start the demo says why, shows its log, and ends with exit code 1."""
    demo = run_demo(MEMSAFE_START_METHOD="by magic")
    assert demo.wait_exit() == 1
    assert "MEMSAFE_START_METHOD='by magic' is not valid" in demo.output()
    assert "demo: failed: the worker ended with exit code" in demo.output()
    demo.check_nothing_left()
