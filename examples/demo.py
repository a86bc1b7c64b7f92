"""Watch a real worker on this pool: idle, at work, idle again; then stock prefork, to compare.

Runs ``celery worker`` as anybody would, on a broker in a temporary folder, with ``stdlib_index``'s task.
Shows the children and their memory while they work, and ends with a table. Needs nothing but the package.

    python examples/demo.py            a large part of the standard library, half a minute or so
    python examples/demo.py --all      all of it

The memory of a child is its private memory (USS); that of a worker is the sum of the proportional memory
(PSS) of the worker and all below it or, where the system does not know that, of the private memory.
1 MB is 10^6 bytes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import folder_broker
import psutil
import stdlib_index
from celery import Celery
from kombu.exceptions import DecodeError

HERE = Path(__file__).parent

#: Bytes of source in one task, and in the sample that is used without --all.
BATCH_BYTES = 600_000
SAMPLE_BYTES = 10_000_000

#: Seconds until the demo gives up: on a worker to be ready; on the next task to end; on children to leave,
#: beyond their idle timeout; on an answer from the worker; on the worker to stop; on what was killed to end.
READY_SECONDS = 60
TASK_SECONDS = 180
LEAVE_SECONDS = 60
ANSWER_SECONDS = 20
STOP_SECONDS = 60
KILL_SECONDS = 30

#: Seconds that a worker has to come to rest before it counts as idle.
SETTLE_SECONDS = 1

#: Seconds between two looks at the processes, and between two lines where lines are not redrawn.
LOOK_SECONDS = 0.3
LINE_SECONDS = 1.0


class DemoFailed(Exception):
    """Something did not happen as it should have."""


class Worker:
    """One ``celery worker``, and what can be seen of it from outside."""

    def __init__(self, folder, pool, options):
        self.pool, self.folder = pool, folder
        self.name = f"{pool.partition(':')[0]}@localhost"
        self.log_path = folder / f"{self.name}.log"
        self.log_path.touch()
        self.client = Celery("demo", set_as_current=False)
        self.client.conf.update(folder_broker.config(folder))
        self.command = [
            "celery", "-A", "stdlib_index", "worker", "--pool", pool, "-c", str(options.concurrency),
            "-n", self.name, "-l", "INFO", "--without-mingle", "--without-gossip",
        ]  # fmt: skip
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "STDLIB_INDEX_FOLDER": str(folder),
            "MEMSAFE_IDLE_TIMEOUT": str(options.idle_timeout),
            "MEMSAFE_MIN_CHILDREN": "0",
        }
        self.process = None

    def start(self):
        """Run the command, and return when the worker is ready for tasks."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl+C is for the demo, which then ends the worker
            )  # fmt: skip
        deadline = time.monotonic() + READY_SECONDS
        while f"{self.name} ready." not in self.log():
            self.check(deadline, "be ready")
            time.sleep(0.05)

    def check(self, deadline, what):
        """Fail if the worker has ended, or the deadline has passed for it to do this."""
        if self.process.poll() is not None:
            raise DemoFailed(f"the worker ended with exit code {self.process.returncode}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"the worker took too long to {what}")

    def log(self):
        """Return all that the worker and its children have written."""
        return self.log_path.read_text(errors="replace")

    def ask(self, question):
        """Return the worker's own answer, as ``celery inspect`` shows it."""
        inspect = self.client.control.inspect(destination=[self.name], timeout=ANSWER_SECONDS, limit=1)
        answer = getattr(inspect, question)()
        if not answer:
            self.check(0, f"answer to inspect {question}")
        return answer[self.name]

    def roles(self):
        """Return the pid of the forkserver, if there is one, and what each child does, by pid."""
        pool = self.ask("stats")["pool"]
        busy = {task["worker_pid"] for task in self.ask("active")}
        memsafe = pool.get("memsafe", {})
        without_task = "starting" if memsafe.get("starting") else "idle"
        return memsafe.get("forkserver"), {
            pid: "busy" if pid in busy else without_task for pid in sorted(pool["processes"])
        }

    def tree(self):
        """Return the worker's process and all below it."""
        worker = psutil.Process(self.process.pid)
        return [worker, *worker.children(recursive=True)]

    def memory(self):
        """Return the proportional memory of each process in bytes, and the private memory, by pid."""
        proportional, private = {}, {}
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                try:
                    memory = process.memory_full_info()
                except psutil.AccessDenied:  # some systems do not say
                    memory = process.memory_info()
                private[process.pid] = getattr(memory, "uss", memory.rss)
                proportional[process.pid] = getattr(memory, "pss", private[process.pid])
        return proportional, private

    def processor_seconds(self):
        """Return the processor time of the worker, of all below it, and of what they have reaped."""
        total = 0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])
        return total

    def stop(self):
        """Ask the worker to stop, as a supervisor of services does, and wait for it."""
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the worker did not stop within {STOP_SECONDS} s") from None
        if code:
            raise DemoFailed(f"the worker ended with exit code {code}")

    def kill(self):
        """End what is left of the worker, whatever it does. All its processes are in one session."""
        if self.process is None:
            return
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline:
            left = [process for process in psutil.process_iter() if self.owns(process)]
            if not left:
                return
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()  # so that it does not stay as a zombie
            psutil.wait_procs(left, timeout=1)
        print(f"demo: processes of {self.name} can not be killed", file=sys.stderr)

    def owns(self, process):
        """Whether a process is of this worker's session, and alive."""
        try:
            return os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            return False


class Screen:
    """Shows what goes on: redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self):
        self.redraws = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.began = time.monotonic()
        self.height = 0
        self.last_line = 0.0

    def say(self, text=""):
        """Print for good."""
        self.height = 0
        print(text, flush=True)

    def show(self, view, *, last=False):
        """Show the present state in place of the one before; ``last``: it stays."""
        if self.redraws:
            lines = view.block()
            up = f"\x1b[{self.height}F\x1b[J" if self.height else ""
            print(up + "\n".join(lines), flush=True)
            self.height = 0 if last else len(lines)
        elif last or time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            print(f"{time.monotonic() - self.began:6.1f} s  {view.line()}", flush=True)


class View:
    """One look at a worker; ``done`` and ``tasks`` are numbers of tasks, while there are any."""

    def __init__(self, worker, done=0, tasks=0):
        self.done, self.tasks = done, tasks
        self.forkserver, self.children = worker.roles()
        proportional, self.private = worker.memory()
        self.total = sum(proportional.values())
        self.worker = worker.process.pid

    def progress(self):
        """Return how many of the tasks are done."""
        return f"{self.done} of {self.tasks} tasks" if self.tasks else ""

    def line(self):
        """Return all of it in one line."""
        found = [
            f"{pid} {state} {mb(self.private[pid])}"
            for pid, state in self.children.items()
            if pid in self.private
        ]
        return f"{self.progress():<15}{mb(self.total):>7} MB   {',  '.join(found) or 'no children'}"

    def block(self):
        """Return a line for each process, with bars."""
        roles = {self.worker: "worker", self.forkserver: "forkserver"}
        roles |= {pid: f"child, {state}" for pid, state in self.children.items()}
        lines = [f"  {'whole tree':<24}{mb(self.total):>7} MB proportional"]
        if self.tasks:
            lines.insert(0, f"  {self.progress():<43}{bar(self.done / self.tasks)}")
        lines += [
            f"  {pid:>8}  {role:<14}{mb(self.private[pid]):>7} MB private {bar(self.private[pid] / 1e8)}"
            for pid, role in roles.items()
            if pid in self.private
        ]
        return lines if self.children else [*lines, "            no children"]


def mb(size):
    """Return bytes as megabytes, for people."""
    return f"{size / 1e6:.1f}"


def bar(share):
    """Return a bar for a number from 0 to 1."""
    return "#" * round(30 * min(share, 1))


def batches(options):
    """Return the modules to index, in batches of about the same size in bytes of source."""
    sizes = {str(path): path.stat().st_size for path in stdlib_index.modules()}
    if not sizes:
        raise DemoFailed("this Python has no sources of its standard library")
    wanted = sum(sizes.values()) if options.all else options.sample
    step = max(sum(sizes.values()) / wanted, 1)
    paths = list(sizes)
    chosen = [paths[int(number * step)] for number in range(int(len(paths) / step)) or [0]]
    found = [[]]
    for path in chosen:
        if found[-1] and sum(sizes[other] for other in found[-1]) + sizes[path] > BATCH_BYTES:
            found.append([])
        found[-1].append(path)
    return found


def watch(worker, screen, results, figures):
    """Show the worker until all tasks have ended; return what they returned."""
    waiting, returned = list(results), []
    deadline = time.monotonic() + TASK_SECONDS
    while waiting:
        worker.check(deadline, "end a task")
        for result in list(waiting):
            with suppress(DecodeError):  # it is being written this very moment
                if result.state == "FAILURE":
                    raise DemoFailed(f"a task failed: {result.result!r}")
                if result.state == "SUCCESS":
                    returned.append(result.result)
                    waiting.remove(result)
                    deadline = time.monotonic() + TASK_SECONDS
        view = View(worker, len(returned), len(results))
        figures["children at work"] = max(figures["children at work"], len(view.children))
        figures["highest"] = max(figures["highest"], view.total)
        screen.show(view, last=not waiting)
        time.sleep(LOOK_SECONDS)
    return returned


def run(worker, screen, work, options):
    """Take a worker through idle, work and idle; return the figures and what the tasks returned."""
    screen.say(f"\n$ {' '.join(worker.command)}")
    worker.start()
    screen.say("-- idle")
    time.sleep(SETTLE_SECONDS)  # prefork's children have begun, but not ended what they do at first
    view = View(worker)
    figures = {"idle": view.total, "children idle": len(view.children), "children at work": 0, "highest": 0}
    screen.show(view, last=True)
    screen.say(f"-- {len(work)} tasks, {sum(map(len, work))} modules")
    began, used = time.monotonic(), worker.processor_seconds()
    results = [worker.client.send_task("stdlib_index.index", (batch,)) for batch in work]
    returned = watch(worker, screen, results, figures)
    figures["seconds"] = time.monotonic() - began
    figures["processor seconds"] = worker.processor_seconds() - used

    screen.say("-- idle again")
    ended = time.monotonic()
    enough = ended + options.idle_timeout + SETTLE_SECONDS
    over = False
    while not over:
        worker.check(enough + LEAVE_SECONDS, "let its idle children go")
        time.sleep(LOOK_SECONDS)
        view = View(worker)
        # The children of prefork stay.
        over = time.monotonic() >= enough and (not view.children or worker.pool == "prefork")
        screen.show(view, last=over)
    figures |= {"at the end": view.total, "children at the end": len(view.children)}
    figures |= {"done": len(returned), "failed": len(work) - len(returned)}
    screen.say("-- stop")
    worker.stop()
    return figures, returned


def summary(ours, prefork, returned):
    """Return the lines of the table."""
    counts = sum((Counter(found["counts"]) for found in returned), Counter())
    length, function = max(found["longest function"] for found in returned)

    def row(name, show):
        return f"{name:<42}{show(ours):>14}{show(prefork):>14}"

    found = [f"{counts[kind]} {kind}" for kind in ("nodes", "functions", "classes", "uses of names")]
    return [
        f"index: {counts['modules']} modules, {counts['unreadable']} of them unreadable; {', '.join(found)};",
        f"       the longest function is {function}, {length} lines",
        "",
        f"{'':<42}{'memsafe_pool':>14}{'prefork':>14}",
        row("children when idle, at work, at the end", children),
        row("memory when idle, before any task", lambda figures: f"{mb(figures['idle'])} MB"),
        row("highest memory seen", lambda figures: f"{mb(figures['highest'])} MB"),
        row("memory at the end", lambda figures: f"{mb(figures['at the end'])} MB"),
        row("time for all tasks", lambda figures: f"{figures['seconds']:.1f} s"),
        row("processor time for all tasks", lambda figures: f"{figures['processor seconds']:.1f} s"),
        row("tasks done, failed", lambda figures: f"{figures['done']}, {figures['failed']}"),
        "",
        f"At the end prefork holds {prefork['at the end'] / ours['at the end']:.1f} times the memory.",
    ]


def children(figures):
    """Return the numbers of children in the three phases."""
    return ", ".join(str(figures[f"children {phase}"]) for phase in ("idle", "at work", "at the end"))


def demo(options, folder, workers):
    """Run both workers, one after the other, and print what came of it."""
    screen, work = Screen(), batches(options)
    screen.say("MB: the memory of the whole worker; then pid, state and private MB of each child.")
    answers = []
    for pool in ("memsafe_pool:Pool", "prefork"):
        workers.append(Worker(folder, pool, options))
        answers.append(run(workers[-1], screen, work, options))
    (ours, returned), (prefork, returned_too) = answers
    if sorted(map(str, returned)) != sorted(map(str, returned_too)):
        raise DemoFailed("the two pools returned different results")
    if ours["children idle"] or ours["children at the end"]:
        raise DemoFailed("an idle worker had children")
    screen.say()
    for line in summary(ours, prefork, returned):
        screen.say(line)


def main():
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="index every module of the standard library")
    add = parser.add_argument
    add("--sample", type=float, default=SAMPLE_BYTES, metavar="BYTES", help="of source, without --all")
    add("-c", "--concurrency", type=int, default=4, metavar="N", help="the most children at a time")
    add("--idle-timeout", type=float, default=2, metavar="SECONDS", help="until an idle child leaves")
    options = parser.parse_args()

    for name in [name for name in os.environ if name.startswith("CELERY")]:
        del os.environ[name]  # settings of other workers, such as another broker
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    workers = []
    with tempfile.TemporaryDirectory(prefix="memsafe-demo-") as folder:
        try:
            demo(options, Path(folder), workers)
        except DemoFailed as failure:
            print(f"\n{workers[-1].log() if workers else ''}\ndemo: failed: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ndemo: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # this takes a moment, and must come to its end
            for worker in workers:
                worker.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
