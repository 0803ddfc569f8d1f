"""The main job on a tiny random model: it runs to its end, or leaves nothing behind."""

import pytest
from PIL import Image

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines import demo


@pytest.fixture(scope="module")
def done(checkpoint, tmp_path_factory):
    """Folder, printed lines and results of one run."""
    folder, lines = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("set_verbosity_error", "disable_progress_bar"):
            patch.setattr(demo.logging, name, lambda: None)
        results = demo.run(checkpoint, folder / "out" / "hits.png", say=lines.append)
    return folder / "out", "\n".join(lines), results


def test_demo_leaves_the_summaries_and_the_picture_and_nothing_else(done):
    folder, _, _ = done
    assert sorted(path.name for path in folder.iterdir()) == ["hits.png", "summaries.safetensors"]
    assert len(Fwd2BotSummary.load_file(folder / "summaries.safetensors")) == 60
    with Image.open(folder / "hits.png") as picture:
        assert picture.width > 600


def test_demo_counts_tokens_and_bytes(done):
    _, _, results = done
    assert {name: result["tokens"] for name, result in results.items()} == {"uncompressed": 16, "k=8": 8, "k=2": 2}
    # 32 values of 2 bytes for each token
    assert {name: result["bytes"] for name, result in results.items()} == {
        "uncompressed": 1024,
        "k=8": 512,
        "k=2": 128,
    }
    assert all(0 < result["first_token_ms"] <= result["answer_ms"] for result in results.values())


def test_demo_prints_one_table_of_the_three_ways(done):
    _, printed, _ = done
    lines = printed.splitlines()
    [head] = [line for line in lines if "uncompressed" in line and "k=8" in line and "k=2" in line]
    assert lines[lines.index(head) + 1].strip("-") == ""
    for row in ("tokens per image", "bytes per image", "time to first token", "time to answer"):
        assert sum(line.startswith(row) for line in lines) == 1
    assert "no vision tower" in printed


def test_folder_as_output_is_refused(checkpoint, tmp_path):
    with pytest.raises(demo.DemoError, match="is a folder"):
        demo.run(checkpoint, tmp_path)


def test_unwritable_place_is_refused_before_any_compute(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.DemoError, match="Nothing can be written into .*--output"):
        demo.run(checkpoint, tmp_path / "file" / "hits.png")


def test_missing_model_is_refused(tmp_path):
    with pytest.raises(demo.DemoError, match="no checkpoint in .*nowhere"):
        demo.run(tmp_path / "nowhere", tmp_path / "hits.png")


def test_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "hits.png"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo._replace(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_answers_are_marked_in_the_table():
    result = {"tokens": 2, "bytes": 4, "first_token_ms": 1.0, "answer_ms": 2.0, "answers": ["3"]}
    asked = {
        "queries": [{"text": "a dog", "files": ["00.png"]}],
        "questions": [{"file": "01.png", "text": "How many?", "answer": "4"}],
    }
    table = demo._table(
        {"uncompressed": {**result, "hits": None}, "k=2": {**result, "answers": ["4"], "hits": [[{"index": 0}]]}},
        asked,
        ["00.png", "01.png"],
    )
    rows = {line.split("  ")[0]: line.split()[-2:] for line in table.splitlines() if line}
    assert rows["a dog"] == ["picture", "0"]
    assert rows["picture 1: How many?"] == ["(wrong)", "4"]
