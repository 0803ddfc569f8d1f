"""Killed, interrupted, on a full disk, several at once: nothing committed is lost, nothing is there twice."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import index_pictures
import numpy as np
import pytest
import tiny

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.indexing import IndexingJob
from fwd2bot.pipelines.store.table import exists

# Each process is a real one, forked from a server that has imported what takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fwd2bot", "peft", "transformers.models.llava.modeling_llava", "transformers.models.siglip.modeling_siglip"]
    + ["transformers.pipelines", "pandas", "pyarrow.dataset", "pydantic"]
)


@contextmanager
def full_disk(size=4_000):
    """No file may grow beyond `size` bytes, in this process; for a block alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_fwd2bot().save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


class Indexing:
    """A process that has loaded the model, and begins to index at `go()`."""

    def __init__(self, *arguments):
        self.pipe, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=index_pictures.index, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()

    def go(self):
        assert self.pipe.recv() == "ready"
        self.pipe.send("go")

    def finish(self):
        """What it says in the end: counts and seconds, or a traceback."""
        said = self.pipe.recv()
        self.process.join()
        return said

    def kill(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)
        self.process.join()


@pytest.fixture
def start(checkpoint):
    """`start(store, folder)` starts an [`Indexing`]; `accelerator` goes the way of a model on one."""
    running = []

    def begin(store, folder, commit_every=8, superuser=True, accelerator=False):
        running.append(Indexing(checkpoint, store, folder, commit_every, superuser, accelerator))
        return running[-1]

    yield begin
    for one in running:
        one.process.kill()
        one.process.join()


def content(path) -> dict[str, tuple]:
    """Every row of a store: source, hash, tokens and embedding by id."""
    store = SummaryStore.open(path)
    names = sorted(store)
    assert len(names) == len(set(names)) == len(store)
    if not names:
        return {}
    summary = store.summary(names).tokens.numpy()
    [(_, vectors)] = store.embeddings(names)
    rows = store.get(names)
    return {
        name: (row["source"], row["hash"], tokens.tobytes(), vector.tobytes())
        for name, row, tokens, vector in zip(names, rows, summary, vectors, strict=True)
    }


def kill_often(start, path, folder, kills, longest, accelerator, known=frozenset()):
    """Kill a process so many times at random moments; the next one is loading meanwhile.

    By turns within `longest` seconds of the beginning, and of the first new commit that is seen.

    Args:
        known: ids of rows that the job replaces or deletes.

    Returns:
        How many kills came after a commit of their process, and what the last process, which is left alone, says.
    """
    drawn, seen, after_commit = random.Random(0), set(), 0
    following = start(path, folder, accelerator=accelerator)
    for number in range(kills):
        killed, following = following, start(path, folder, accelerator=accelerator)
        killed.go()
        while number % 2 and not (exists(path) and set(SummaryStore.open(path)) - seen - known):
            assert killed.process.is_alive()
        time.sleep(drawn.uniform(0, longest))
        killed.kill()
        assert killed.process.exitcode == -signal.SIGKILL, "it had come to its end before: give it more to do"
        found = set(content(path)) - known if exists(path) else set()
        assert seen <= found  # what was committed once stays
        after_commit += len(found) > len(seen)
        seen = found
    following.go()
    return after_commit, following.finish()


FEW = pytest.param(2, 120, False, id="2")
MANY = pytest.param(20, 600, False, id="20", marks=pytest.mark.slow)
MANY_AHEAD = pytest.param(20, 600, True, id="20-accelerator", marks=pytest.mark.slow)


@pytest.mark.parametrize(("kills", "count", "accelerator"), [FEW, MANY, MANY_AHEAD])
def test_killed_job_run_again_gives_the_store_of_an_undisturbed_one(
    start, save_pictures, tmp_path, kills, count, accelerator
):
    folder, paths = save_pictures(count)
    for path in paths[5::40]:
        path.write_bytes(b"no picture")
    broken = len(paths[5::40])
    undisturbed = start(tmp_path / "undisturbed", folder, accelerator=accelerator)
    undisturbed.go()
    *counts, seconds = undisturbed.finish()
    assert counts == [count - broken, 0, 0, 0, broken]
    # All kills together come within some quarter of the time that the work takes if the machine is as busy as before.
    after_commit, (added, updated, duplicates, skipped, failed, _) = kill_often(
        start, tmp_path / "killed", folder, kills, seconds / kills / 2, accelerator
    )
    assert after_commit >= kills // 2
    assert 8 * after_commit <= skipped and added + skipped == count - broken
    assert (updated, duplicates, failed) == (0, 0, broken)
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize(("kills", "count", "accelerator"), [FEW, MANY, MANY_AHEAD])
def test_killed_job_on_changed_files_gives_the_store_of_an_undisturbed_one(
    start, save_pictures, tmp_path, kills, count, accelerator
):
    folder, paths = save_pictures(count)
    first = start(tmp_path / "undisturbed", folder)
    first.go()
    first.finish()
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "killed")
    before = content(tmp_path / "undisturbed")
    for index, (path, picture) in enumerate(zip(paths, tiny.pictures(count, seed=9), strict=True)):
        if index % 12 == 5:
            path.write_bytes(b"broken now")  # which leaves the row as it was
        elif index % 12 == 7:
            path.write_bytes(paths[0].read_bytes())  # a copy, whose row goes
        else:
            picture.save(path)
    broken, copies = len(paths[5::12]), len(paths[7::12])
    undisturbed = start(tmp_path / "undisturbed", folder, accelerator=accelerator)
    undisturbed.go()
    *counts, seconds = undisturbed.finish()
    changed = count - broken - copies
    assert counts == [0, changed, copies, 0, broken]

    after_commit, (added, updated, duplicates, skipped, failed, _) = kill_often(
        start, tmp_path / "killed", folder, kills, seconds / kills / 2, accelerator, known=set(before)
    )
    assert after_commit >= kills // 2
    assert (added, updated + skipped, duplicates, failed) == (0, changed, copies, broken) and skipped >= 8
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


@pytest.mark.usefixtures("each_device")
def test_interrupted_job_keeps_what_was_compressed(store, save_pictures, monkeypatch):
    folder, _ = save_pictures(20)
    original, calls = store._compressor.compress, []

    def interrupted(inputs):
        calls.append(inputs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(inputs)

    monkeypatch.setattr(store._compressor, "compress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(folder, batch_size=4)
    assert len(store) == 12
    report = store.add(folder, batch_size=4)
    assert (report.added, report.skipped) == (8, 12)


@pytest.mark.usefixtures("each_device")
def test_ctrl_c_in_the_midst_of_a_commit_ends_it_first(store, save_pictures, monkeypatch):
    folder, _ = save_pictures(20)
    original, calls = store._table.upsert, []

    def interrupted(rows, replaced):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(rows, replaced)

    monkeypatch.setattr(store._table, "upsert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(folder, batch_size=4, commit_every=8)
    assert calls == [8, 8, 8] and len(store) == 16


def test_ctrl_c_between_a_picture_and_what_it_replaces_leaves_no_old_row(store, save_pictures, monkeypatch):
    folder, paths = save_pictures(4)
    store.add(folder)
    for path, picture in zip(paths, tiny.pictures(4, seed=9), strict=True):
        picture.save(path)
    original, calls = IndexingJob._replace, []

    def interrupted(job, item):
        calls.append(item)
        if len(calls) == 1:
            raise KeyboardInterrupt
        original(job, item)

    monkeypatch.setattr(IndexingJob, "_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(folder)
    store.add(folder)
    assert len(store) == 4


@pytest.mark.parametrize("accelerator", [False, True])
def test_ctrl_c_ends_a_process_and_the_next_goes_on(start, save_pictures, tmp_path, accelerator):
    folder, _ = save_pictures(200)
    process, following = (start(tmp_path / "s", folder, accelerator=accelerator) for _ in range(2))
    process.go()
    while not (exists(tmp_path / "s") and len(SummaryStore.open(tmp_path / "s"))):
        assert process.process.is_alive()
    process.kill(signal.SIGINT)
    assert "KeyboardInterrupt" in process.finish() and process.process.exitcode == 1
    following.go()
    added, updated, duplicates, skipped, failed, _ = following.finish()
    assert added + skipped == 200 and skipped > 0 and updated == duplicates == failed == 0
    assert len(content(tmp_path / "s")) == 200


def test_two_processes_that_add_the_same_pictures_store_each_once(start, save_pictures, new_store):
    folder, _ = save_pictures(80)
    store = new_store()
    both = [start(store.path, folder, commit_every=5) for _ in range(2)]
    for process in both:
        process.go()
    for process in both:
        assert process.finish()[4] == 0
    assert len(content(store.path)) == 80


def test_reader_beside_a_writer_sees_whole_commits(start, save_pictures, new_store):
    folder, _ = save_pictures(80)
    store, seen = new_store(), [0]
    process = start(store.path, folder, commit_every=10)
    process.go()
    while process.process.is_alive():
        seen.append(len(store))
        assert seen[-1] % 10 == 0 and seen[-1] >= seen[-2]
        if seen[-1]:
            assert len(store.search(np.ones(32, np.float32), 3)) == 3
    assert process.finish()[0] == 80 == len(store)
    assert len(set(seen)) > 2


def test_threads_that_add_at_once_store_everything_once(store):
    shown = tiny.pictures(40)
    threads = [threading.Thread(target=store.add, args=(shown[part : part + 20],)) for part in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) == len(set(store)) == 40


def test_threads_that_make_columns_at_once_make_them_all(new_store):
    store, shown = new_store(), tiny.pictures(24)
    threads = [
        threading.Thread(
            target=store.add,
            args=(shown[part : part + 6],),
            kwargs={"metadata": {"shared": part, f"own{part}": "x"}, "batch_size": 1, "commit_every": 1},
        )
        for part in (0, 6, 12, 18)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [row["metadata"] for row in store.get(list(store))]
    assert len(found) == 24
    for metadata in found:
        part = metadata.pop("shared")
        assert {name for name, value in metadata.items() if value == "x"} == {f"own{part}"}


def test_full_disk_keeps_what_was_committed_and_the_same_call_goes_on(store, save_pictures):
    folder, _ = save_pictures(40)
    store.add(f"{folder}/0-00*.png")
    before = content(store.path)
    with full_disk(), pytest.raises(OSError, match="The disk is full. What was committed before is there"):
        store.add(folder)
    assert content(store.path) == before
    report = store.add(folder)
    assert (report.added, report.skipped) == (30, 10)


@pytest.mark.parametrize("size", [2_000, 4_000, 8_000])
def test_full_disk_keeps_the_rows_of_changed_files(store, save_pictures, size):
    folder, paths = save_pictures(40)
    store.add(folder)
    before = content(store.path)
    for path, picture in zip(paths[:30], tiny.pictures(30, seed=77), strict=True):
        picture.save(path)
    with full_disk(size), pytest.raises(OSError, match="The disk is full. What was committed before is there"):
        store.add(folder)
    assert content(store.path) == before
    report = store.add(folder)
    assert (report.updated, report.skipped) == (30, 10)
    assert {row[0] for row in content(store.path).values()} == set(map(str, paths))


def test_changed_files_are_replaced_in_one_commit(store, save_pictures):
    folder, paths = save_pictures(6)
    store.add(folder)
    tiny.pictures(1, seed=9)[0].save(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())  # a copy now, so that its row goes without a new one
    version = store._table.table.version
    store.add(folder)
    assert store._table.table.version == version + 1 and len(store) == 5


def test_row_that_another_writer_has_given_to_another_file_stays(store, save_pictures, monkeypatch):
    folder, [path] = save_pictures(1)
    store.add(path)
    copy = folder / "copy.png"
    copy.write_bytes(path.read_bytes())
    tiny.pictures(1, seed=9)[0].save(path)
    original, other = store._table.upsert, SummaryStore.open(store.path, *loaded(store))

    def upsert(rows, replaced):
        assert other.add(copy).updated == 1  # between the look-up and the commit of the first writer
        original(rows, replaced)

    monkeypatch.setattr(store._table, "upsert", upsert)
    store.add(path)
    assert {row[0] for row in content(store.path).values()} == {str(path), str(copy)}


def loaded(store):
    return store._compressor.model, store._compressor.processor


def test_read_only_folder_is_an_error_that_says_so(filled, start, save_pictures):
    store, _ = filled
    folder, _ = save_pictures(3)
    for path in (Path(store.path), *Path(store.path).rglob("*")):
        if path.is_dir():
            path.chmod(0o555)
    try:
        process = start(store.path, folder, superuser=False)
        process.go()
        said = process.finish()
    finally:
        for path in (Path(store.path), *Path(store.path).rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
    assert "The folder cannot be written to by this user" in said
    assert len(store) == 12
