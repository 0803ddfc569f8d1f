"""Saving: all that belongs into the folder, or nothing; never a mixture of two checkpoints."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import tiny

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.folder_fwd2bot import MODEL_FILES, PIPELINE_FILES, draft_folder

WEIGHTS = "model.safetensors"


def test_push_to_hub_uploads_code_and_weights(monkeypatch, tmp_path):
    uploaded = []

    def upload(self, working_dir, *args, **kwargs):
        uploaded.extend(path.name for path in type(tmp_path)(working_dir).iterdir())

    monkeypatch.setattr(Fwd2BotForConditionalGeneration, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: RepoUrl(repo_id))
    model = tiny.tiny_fwd2bot()
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert {"config.json", WEIGHTS, *MODEL_FILES, *PIPELINE_FILES} <= set(uploaded)
    uploaded.clear()
    model.push_to_hub("someone/mine")
    assert {"config.json", WEIGHTS, *MODEL_FILES, *PIPELINE_FILES} <= set(uploaded)


class RepoUrl:
    """What `create_repo` returns, as far as it is read."""

    def __init__(self, repo_id):
        self.repo_id = repo_id


def test_saving_where_a_file_is_writes_nothing(tmp_path):
    place = tmp_path / "file"
    place.write_text("precious")
    with pytest.raises(NotADirectoryError, match="is a file. Give a folder"):
        tiny.tiny_fwd2bot().save_pretrained(place)
    with pytest.raises(NotADirectoryError):
        tiny.tiny_fwd2bot().save_pretrained(place / "below")
    assert place.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [place]


@contextmanager
def full_disk():
    """No file may grow beyond 4 kB, in this process; for a block alone, since pytest itself may write to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_that_fails_leaves_the_older_checkpoint_as_it_was(tmp_path, processor):
    tiny.tiny_fwd2bot(seed=0).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = tiny.tiny_fwd2bot(seed=1)
    with full_disk(), pytest.raises(Exception, match="large|space"):
        other.save_pretrained(tmp_path)
    with full_disk(), pytest.raises(Exception, match="large|space"):
        processor.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_save_that_fails_leaves_no_new_folder(tmp_path):
    model = tiny.tiny_fwd2bot()
    with full_disk(), pytest.raises(Exception, match="large|space"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_over_a_sharded_checkpoint_leaves_no_shard_behind(tmp_path, processor):
    model = tiny.tiny_fwd2bot()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("model*.safetensors*")) == [WEIGHTS]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}])
def test_folder_that_was_left_while_its_files_were_moved_cannot_be_loaded(tmp_path, monkeypatch, options):
    """Killed between two files, it holds weights of two models; the next save puts it right."""
    tiny.tiny_fwd2bot(seed=0).save_pretrained(tmp_path)
    other, real = tiny.tiny_fwd2bot(seed=1), os.replace

    def replace_some(source, target):
        if str(target).endswith(".json") or "-00002-" in str(target):
            raise OSError("killed")
        real(source, target)

    monkeypatch.setattr("fwd2bot.folder_fwd2bot.os.replace", replace_some)
    with pytest.raises(OSError, match="killed"):
        other.save_pretrained(tmp_path, **options)
    monkeypatch.undo()
    with pytest.raises((OSError, ValueError)):
        Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path, **options)
    assert Fwd2BotForConditionalGeneration.from_pretrained(tmp_path).fingerprint == other.fingerprint


def test_rest_of_a_killed_save_is_cleared_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with draft_folder(tmp_path) as draft:  # of this process, which lives
        (draft / WEIGHTS).write_bytes(b"half")
        rest = tmp_path / draft.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
        shutil.copytree(draft, rest)
        tiny.tiny_fwd2bot().save_pretrained(tmp_path)
        assert draft.exists() and not rest.exists()


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    tiny.tiny_fwd2bot().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_distributed_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="distributed_checkpoint is not supported"):
        tiny.tiny_fwd2bot().save_pretrained(tmp_path / "new", distributed_checkpoint=True)
    assert not (tmp_path / "new").exists()


def test_saving_without_the_code_at_hand_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("fwd2bot.folder_fwd2bot.PIPELINE_FILES", ("lost.py",))
    with pytest.raises(FileNotFoundError, match="lost.py, which belongs into a checkpoint folder"):
        tiny.tiny_fwd2bot().save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
