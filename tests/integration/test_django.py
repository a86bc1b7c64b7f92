"""A Django project whose worker opens its database before there are children."""

from __future__ import annotations

import pytest


def start_site(start_worker, start_method, config=None, concurrency=3, **options):
    return start_worker(
        "site_of_notes", config=config, start_method=start_method, concurrency=concurrency, **options
    )


def add_together(worker, number):
    """Run a task in each of so many children at once: what each returns."""
    folder = worker.folder / "meeting"
    folder.mkdir()
    task = "site_of_notes.notes.tasks.add_together"
    return [worker.get(result) for result in [worker.call(task, str(folder), number) for _ in range(number)]]


@pytest.mark.also_start_method("fork")
def test_each_child_opens_the_database_itself(start_worker, start_method):
    """The connection that the worker opened at its start is not the children's; each opens its own."""
    worker = start_site(start_worker, start_method)
    found = add_together(worker, 3)
    children = {pid for _, _, pid in found}
    assert len(children) == 3
    for was_open, opened_by, pid in found:
        assert not was_open
        assert opened_by == pid
    assert worker.run("site_of_notes.notes.tasks.count") == 3


@pytest.mark.ours_only("forkserver")
def test_a_fresh_forkserver(start_worker):
    """The same where the forkserver is a fresh interpreter that sets Django up itself."""
    worker = start_site(start_worker, "forkserver", {"memsafe_child_env": {"A": "1"}})
    assert all(not was_open and opened_by == pid for was_open, opened_by, pid in add_together(worker, 2))


@pytest.mark.also_start_method("fork")
@pytest.mark.parametrize("reuse", [False, True])
def test_the_connection_is_closed_after_each_task(start_worker, start_method, reuse):
    """As with prefork: closed after each task, unless ``CELERY_DB_REUSE_MAX`` keeps it for so many."""
    config = {"db_reuse_max": 100} if reuse else {}
    worker = start_site(start_worker, start_method, config, concurrency=1)
    found = [worker.run("site_of_notes.notes.tasks.add", "x") for _ in range(3)]
    assert [was_open for was_open, _, _ in found] == [False, reuse, reuse]


@pytest.mark.ours_only("its settings")
def test_settings_from_the_settings_module(start_worker, start_method):
    """The pool and its settings come from ``CELERY_...`` names."""
    config = {"worker_pool": "memsafe_pool:Pool", "memsafe_min_children": 1}
    worker = start_site(start_worker, start_method, config, pool=None)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 1, "the child that is always kept")
    pool = worker.stats()["pool"]
    assert pool["implementation"] == "memsafe_pool.prefork:Pool"
    assert pool["memsafe"]["start_method"] == start_method


@pytest.mark.ours_only("its settings")
def test_a_wrong_setting_in_the_settings_module(start_worker):
    """It stops the worker with a sentence."""
    worker = start_worker("site_of_notes", config={"memsafe_min_children": -1}, ready=False)
    assert worker.wait_exit() != 0
    assert "memsafe_min_children=-1 is not valid: it must be" in worker.log()
    assert "Traceback" not in worker.log()
