"""Rows of every format as samples, through files as they lie around."""

import json

import datasets
import pytest
import tiny
from tiny_sources import (
    caption_rows,
    llava_rows,
    picture_bytes,
    write_captions,
    write_images,
    write_json,
    write_llava,
    write_tar,
)

from fwd2bot.training.source_recipe import SourceRecipe
from fwd2bot.training.sources import MalformedRowError, Source


def samples(recipe):
    source = Source(recipe)
    return [source.read(row, number) for number, row in enumerate(source.table)]


def parts(message):
    return [part.get("text", part["type"]) for part in message["content"]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # 5 s at the end of every stream


def test_conversations_with_an_image_folder(tmp_path):
    first, *rest = samples(write_llava(tmp_path))
    assert len(rest) == 7
    assert first["key"] == "chat-0" and first["source"] == "chat"
    assert first["images"] == [str(tmp_path / "images" / "0.png")]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert list(map(parts, first["messages"])) == [["image", "What is number 0?"], ["It is 0."]]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_conversations_of_mixed_kinds_in_one_file(tmp_path, ending):
    """Words alone, several images, ids that are numbers and names: as in LLaVA-665K."""
    names = write_images(tmp_path / "images", 2)
    rows = [
        {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "id": "two",
            "image": names,
            "conversations": [
                {"from": "human", "value": "<image>\nand <image> differ?"},
                {"from": "gpt", "value": "Yes"},
                {"from": "human", "value": "How?"},
                {"from": "gpt", "value": "By colour"},
            ],
        },
        {"id": "unmarked", "image": names[0], "conversations": [
            {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog"}]},
    ]  # fmt: skip
    path = write_json(tmp_path / f"mixed.{ending}", rows)
    words, two, unmarked = samples(
        SourceRecipe(name="mixed", format="llava", path=path, images=str(tmp_path / "images"))
    )
    assert (words["key"], words["images"], parts(words["messages"][0])) == ("7", [], ["Hi"])
    assert len(two["images"]) == 2 and parts(two["messages"][0]) == ["image", "and ", "image", " differ?"]
    assert len(two["messages"]) == 4
    assert parts(unmarked["messages"][0]) == ["image", "What?"]


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_line_is_a_malformed_row_of_many(tmp_path, streaming):
    recipe = write_llava(tmp_path, 2)
    good = [json.dumps(row) for row in llava_rows(["0.png", "1.png"])]
    (tmp_path / "chat.jsonl").write_text("\n".join([good[0], "{'id': 1", "[]", good[1]]), encoding="utf-8")
    recipe.path, recipe.streaming = str(tmp_path / "chat.jsonl"), streaming
    source = Source(recipe)
    rows = list(source.table)
    assert [source.read(rows[number], number)["key"] for number in (0, 3)] == ["chat-0", "chat-1"]
    for number, reason in ((1, "the line is no JSON"), (2, "the line holds list")):
        assert source.read.key(rows[number], number) == f"row {number}"
        with pytest.raises(MalformedRowError, match=reason):
            source.read(rows[number], number)


def test_messages_with_parts_with_words_and_with_images_inside(tmp_path):
    names = write_images(tmp_path / "images", 2)
    told = {"role": "assistant", "content": "Fine"}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]}, told],
         "images": [names[0]]},
        {"messages": [{"role": "user", "content": "B?"}, told], "images": [names[1]]},
        {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "C?"}, told]},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "path": names[0]}, {"type": "text", "text": "D?"}]}, told]},
    ]  # fmt: skip
    path = write_json(tmp_path / "m.jsonl", rows)
    found = samples(SourceRecipe(name="m", format="messages", path=path, images=str(tmp_path / "images")))
    assert [len(sample["images"]) for sample in found] == [1, 1, 0, 1]
    assert [parts(sample["messages"][-2]) for sample in found] == [
        ["image", "A?"], ["image", "B?"], ["C?"], ["image", "D?"]
    ]  # fmt: skip
    assert found[2]["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "Be brief"}]}


def test_messages_with_pictures_in_parquet(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This"}], "images": [one]}
        for one in tiny.pictures(2)
    ]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "m.parquet")
    found = samples(SourceRecipe(name="m", format="messages", path=str(tmp_path / "m.parquet")))
    assert all(isinstance(sample["images"][0], bytes) for sample in found)


def test_captions_of_parquet_of_a_saved_data_set_and_of_one_in_splits(tmp_path):
    [first, *_] = samples(write_captions(tmp_path))
    assert first["captions"] == ["photo 0", ("a long text on 0 " * 4).strip()]
    assert first["images"] == [caption_rows(1)[0]["image"]] and first["key"] == "photo-0"
    rows = [{"picture": one, "caption": f"one {number}"} for number, one in enumerate(tiny.pictures(2))]
    saved = datasets.Dataset.from_list(
        rows, datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")})
    )
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(validation=saved).save_to_disk(tmp_path / "splits")
    for folder, split in (("saved", "train"), ("splits", "validation")):
        recipe = SourceRecipe(
            name="s", format="captions", path=str(tmp_path / folder), split=split, columns={"image": "picture"}
        )
        found = samples(recipe)
        assert [sample["captions"] for sample in found] == [["one 0"], ["one 1"]]
        assert isinstance(found[0]["images"][0], bytes) and found[0]["key"] == "row 0"
    with pytest.raises(ValueError, match="split is 'train'; validation are there"):
        Source(SourceRecipe(name="s", format="captions", path=str(tmp_path / "splits")))


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_and_conversations_of_webdataset_tars(tmp_path, streaming):
    one, two = picture_bytes(2)
    for number in range(2):
        members = {"a.png": one, "a.txt": b"first", "b.png": two, "b.txt": b"second"}
        write_tar(tmp_path / f"c{number}.tar", {f"{number}{name}": content for name, content in members.items()})
    recipe = SourceRecipe(name="t", format="captions", path=str(tmp_path / "c*.tar"), streaming=streaming)
    found = samples(recipe)
    assert [(sample["key"], sample["captions"]) for sample in found][:2] == [("0a", ["first"]), ("0b", ["second"])]
    assert len(found) == 4 and found[0]["images"] == [one]
    talk = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That"}]}
    path = write_tar(tmp_path / "m.tar", {"x.jpg": one, "x.json": json.dumps(talk).encode()})
    [sample] = samples(SourceRecipe(name="t", format="messages", path=path, streaming=streaming))
    assert list(map(parts, sample["messages"])) == [["image", "What?"], ["That"]] and sample["images"] == [one]


def test_questions_joined_with_a_table_of_images_by_an_id(tmp_path):
    pictures = picture_bytes(2)
    datasets.Dataset.from_dict({"image_id": [5, 6], "image": pictures}).to_parquet(tmp_path / "images.parquet")
    questions = {"image_id": ["6", "5", "9"], "question": ["A?", "B?", "C?"], "answer": [["desk", "lamp"]] * 3}
    datasets.Dataset.from_dict(questions).to_parquet(tmp_path / "qa.parquet")
    recipe = SourceRecipe(
        name="qa",
        format="vqa",
        path=str(tmp_path / "qa.parquet"),
        images=str(tmp_path / "images.parquet"),
        columns={"image_id": "image_id"},
        question_suffix="\nIn a word.",
        answers="join",
    )
    source = Source(recipe)
    first, second = (source.read(source.table[number], number) for number in range(2))
    assert (first["images"], second["images"]) == ([pictures[1]], [pictures[0]])
    assert list(map(parts, first["messages"])) == [["image", "A?\nIn a word."], ["desk, lamp"]]
    with pytest.raises(MalformedRowError, match="has no image '9'"):
        source.read(source.table[2], 2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("red", "red"), (["no", "yes", "yes"], "yes"), ([{"answer": "two"}], "two"), (True, "true"), (3, "3")],
)
def test_answers_of_several_kinds(tmp_path, answer, expected):
    row = {"image": write_images(tmp_path / "images", 1)[0], "question": "?", "answer": answer}
    path = write_json(tmp_path / "qa.jsonl", [row])
    [sample] = samples(SourceRecipe(name="qa", format="vqa", path=path, images=str(tmp_path / "images")))
    assert parts(sample["messages"][1]) == [expected]


TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": None, "conversations": TURNS}, r"texts show 1 image\(s\), but it has 0"),
        ({"image": "nowhere.png", "conversations": TURNS}, "nowhere.png' is not there"),
        ({"image": "https://example.org/a.png", "conversations": TURNS}, "is an address"),
        ({"image": "0.png", "conversations": TURNS[:1]}, "no turn of the assistant"),
        ({"image": "0.png", "conversations": "hello"}, "no list of turns"),
        ({"image": "0.png", "conversations": None}, "it has no conversations"),
        ({"image": "0.png", "conversations": [{"from": "robot", "value": "a"}]}, "role 'robot' is none of human"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": 3}]}, "holds int, no text"),
        ({"image": "0.png", "conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]}, "show 2 image"),
    ],
)
def test_malformed_row_says_what_is_wrong(tmp_path, row, reason):
    source = Source(write_llava(tmp_path, 1))
    with pytest.raises(MalformedRowError, match=reason):
        source.read(row, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"captions": "text"}}, "has no column text for captions; it has id, image, captions"),
        ({"columns": {"image": "photo"}}, "has no column photo for image"),
        ({"path": "nowhere/captions.parquet"}, "'nowhere/captions.parquet', where no file is"),
        ({"path": "nowhere/at/all"}, "no file or folder and no Hub id"),
        ({"images": "nowhere"}, "images is 'nowhere', which is not there"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_source_that_cannot_be_used_is_named(tmp_path, change, message, streaming):
    recipe = write_captions(tmp_path, streaming=streaming)
    for name, value in change.items():
        setattr(recipe, name, value)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"data.sources\['photos'\].*{message}"):
        Source(recipe)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_and_damaged_files_are_named(tmp_path, streaming):
    datasets.Dataset.from_dict({"image": [], "captions": []}).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "bad.json").write_text("{not json")
    empty = ["empty.jsonl", "empty.csv", "empty.json"]
    for name in empty:
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text("[]")
    nothing = [(name, " is empty: .*no rows. Correct") for name in (*empty, "list.json")]
    known = [("empty.parquet", " is empty"), ("bad.parquet", ".*cannot be"), ("bad.json", ".*cannot be")]
    for name, message in (*known, *nothing):
        path = str(tmp_path / name)
        with pytest.raises(ValueError, match=rf"data.sources\['e'\]{message}"):
            Source(SourceRecipe(name="e", format="captions", path=path, streaming=streaming))
