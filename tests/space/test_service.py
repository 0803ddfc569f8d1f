"""The service without its page: a visitor's pictures, search, questions, looking inside, bad input, many at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from space_files import upload

from fwd2bot.pipelines.embedded import gallery, showcase
from fwd2bot.space_app import visitors
from fwd2bot.space_app.uploads import Upload, VisitorError
from fwd2bot.space_app.views import heat_map
from fwd2bot.space_app.visitors import SupersededError


def last(stream):
    return list(stream)[-1]


# A visitor's own pictures


def test_added_pictures_are_found_and_bad_files_are_told(service, visitor):
    own = Upload("snow.png", gallery()[47].path.read_bytes())
    seen = []
    added = service.add(visitor, [own, Upload("notes.jpg", b"words")], lambda *done: seen.append(done))
    assert [picture.title for picture in added.pictures] == ["snow.png"]
    assert len(added.problems) == 1 and "notes.jpg" in added.problems[0]
    assert seen == [(1, 2), (2, 2)]
    hits = service.search(visitor, "two snowmen on a blue field", 8, top_k=2)
    assert {hit.picture.id for hit in hits} == {"own-1", "gallery-47"}


def test_same_picture_is_compressed_once_whatever_its_file_is_called(service, visitor):
    content = gallery()[3].path.read_bytes()
    first = service.add(visitor, [Upload("a.png", content), Upload("b.png", content)])
    assert [picture.title for picture in first.pictures] == ["a.png"]
    assert first.problems == ["“b.png” is the same picture as “a.png”, and is taken once."]
    again = service.add(visitor, [Upload("c.png", content)])
    assert (again.pictures, again.problems, again.again) == ([], [], [("c.png", first.pictures[0])])
    assert len(service.own(visitor)) == 1


def test_pictures_of_one_visitor_are_not_those_of_another(service, visitor):
    service.add(visitor, [upload()])
    assert service.own(f"{visitor} other") == []
    with pytest.raises(VisitorError, match="There is no picture 'own-1' in this session.*add it again"):
        last(service.ask(f"{visitor} other", "What is it?", ["own-1"], 4))


def test_removed_pictures_are_gone(service, visitor):
    service.add(visitor, [upload()])
    service.remove_own(visitor)
    assert service.own(visitor) == []
    assert all(not hit.picture.id.startswith("own") for hit in service.search(visitor, "a dog", 4, top_k=50))


def test_pictures_that_are_compressed_while_all_are_removed_do_not_come_back(service, visitor, monkeypatch):
    compress = service.compress

    def removed(images):
        service.remove_own(visitor)
        return compress(images)

    with monkeypatch.context() as patch:
        patch.setattr(service, "compress", removed)
        with pytest.raises(VisitorError, match="removed while others were added. Add those again"):
            service.add(visitor, [upload()])
    assert service.own(visitor) == []
    assert len(service.add(visitor, [upload()]).pictures) == 1


def test_pictures_that_were_sent_before_all_were_removed_and_come_after_it_are_not_taken(service, visitor):
    assert len(service.add(visitor, [upload()], removals=0).pictures) == 1
    service.remove_own(visitor, 1)
    with pytest.raises(VisitorError, match="removed while others were added. Add those again"):
        service.add(visitor, [upload()], removals=0)
    assert service.own(visitor) == []
    assert len(service.add(visitor, [upload()], removals=1).pictures) == 1


def test_pictures_that_overtake_the_removal_before_them_stay(service, visitor):
    one, other = [Upload(f"{index}.png", gallery()[index].path.read_bytes()) for index in range(2)]
    service.add(visitor, [one], removals=0)
    service.add(visitor, [other], removals=1)
    service.remove_own(visitor, 1)
    assert [picture.title for picture in service.own(visitor)] == ["1.png"]


@pytest.mark.parametrize("removals", [-1, 1.0, "1", True, 2**40])
def test_bad_number_of_removals_is_refused(service, visitor, removals):
    with pytest.raises(VisitorError, match="removals must be a whole number from 0 to"):
        service.add(visitor, [upload()], removals=removals)


def test_pictures_beyond_the_room_are_told_and_those_that_are_here_take_none(service, visitor, monkeypatch):
    monkeypatch.setattr(visitors, "MAX_FILES", 2)
    one, *more = [Upload(f"{index}.png", gallery()[index].path.read_bytes()) for index in range(4)]
    service.add(visitor, [one])
    added = service.add(visitor, [one, *more])
    assert [picture.title for picture in added.pictures] == ["1.png"] and added.again[0][0] == "0.png"
    assert [words.split(".")[0] for words in added.problems] == ["Not added, for want of room: 2"]
    assert service.add(visitor, [one]).problems == []


def test_two_uploads_at_once_of_one_picture_are_one(service, visitor, monkeypatch):
    compress, both = service.compress, threading.Barrier(2, timeout=20)

    def together(images):
        both.wait()
        return compress(images)

    monkeypatch.setattr(service, "compress", together)
    one = [Upload("a.png", gallery()[5].path.read_bytes())]
    with ThreadPoolExecutor(2) as pool:
        added = list(pool.map(lambda files: service.add(visitor, files), [one, one]))
    assert sorted(len(each.pictures) for each in added) == [0, 1]
    assert sorted(len(each.again) for each in added) == [0, 1]
    assert len(service.own(visitor)) == 1


def test_visitor_who_leaves_during_a_search_is_not_held_again(service, visitor, monkeypatch):
    compress = service._compress_texts

    def leaves(texts):
        service.visitors.leave(visitor)
        return compress(texts)

    monkeypatch.setattr(service, "_compress_texts", leaves)
    assert service.search(visitor, "a dog", 4) and visitor not in service.visitors


@pytest.mark.parametrize(("count", "words"), [(0, "No file came"), (500, "500 files came at once; at most 24")])
def test_wrong_number_of_files_is_refused(service, visitor, count, words):
    with pytest.raises(VisitorError, match=words):
        service.add(visitor, [upload()] * count)


def test_looking_at_what_is_held_of_a_visitor_holds_nothing(service, visitor):
    assert service.own(visitor) == [] and service.rerank(visitor, 4) == []
    service.search(visitor, "a dog", 4, keep=False)
    service.remove_own(visitor)
    service.new_conversation(visitor)
    assert visitor not in service.visitors


# Search


def test_removed_pictures_take_the_search_for_one_with_them(service, visitor):
    service.search(visitor, Upload("mine.png", gallery()[5].path.read_bytes()), 8)
    service.remove_own(visitor)
    assert service.rerank(visitor, 4) == []


def test_reranking_after_a_search_that_failed_does_not_bring_the_one_before(service, visitor):
    service.search(visitor, "two snowmen", 8)
    with pytest.raises(VisitorError, match="empty"):
        service.search(visitor, "", 8)
    assert service.rerank(visitor, 4) == []


def test_search_that_another_one_has_overtaken_gives_no_hits_and_is_not_ranked_anew(service, visitor, monkeypatch):
    compress = service._compress_texts

    def overtaken(texts):
        monkeypatch.setattr(service, "_compress_texts", compress)
        service.search(visitor, "two snowmen on a blue field", 8)
        return compress(texts)

    monkeypatch.setattr(service, "_compress_texts", overtaken)
    with pytest.raises(SupersededError):
        service.search(visitor, "a red square", 8)
    assert service.rerank(visitor, 8, top_k=1)[0].picture.id == "gallery-47"


def test_pictures_removed_during_a_search_take_it_with_them(service, visitor, monkeypatch):
    compress = service.compress

    def removed(images):
        service.remove_own(visitor)
        return compress(images)

    monkeypatch.setattr(service, "compress", removed)
    with pytest.raises(SupersededError):
        service.search(visitor, Upload("mine.png", gallery()[5].path.read_bytes()), 8)
    assert service.rerank(visitor, 8) == []


def test_sentence_finds_the_picture_that_it_is_true_of(service, visitor):
    for query in showcase()["queries"]:
        [best] = service.search(visitor, query["text"], 8, top_k=1)
        assert f"{best.picture.id.removeprefix('gallery-')}.png" in query["files"]


def test_picture_finds_itself(service, visitor):
    [best] = service.search(visitor, Upload("x.png", gallery()[5].path.read_bytes()), 8, top_k=1)
    assert best.picture.id == "gallery-05" and best.score > 0.99


def test_reranking_equals_a_new_search_and_runs_no_model(service, visitor, monkeypatch):
    meant = {k: service.search(visitor, "a red square", k) for k in (1, 3, 16)}
    monkeypatch.setattr(service.model, "_compress_pass", None)
    for k, hits in meant.items():
        again = service.rerank(visitor, k)
        assert [hit.picture.id for hit in again] == [hit.picture.id for hit in hits]
        assert torch.allclose(torch.tensor([h.score for h in again]), torch.tensor([h.score for h in hits]), atol=1e-5)


def test_reranking_before_a_search_shows_nothing(service, visitor):
    assert service.rerank(visitor, 4) == []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("  ", "The query is empty. Write at least one word"),
        ("两个雪人", "simple English only.*two snowmen"),
        ("x" * 1001, "has 1001 characters; at most 1000"),
        ("an <image> here", "marks a picture. Leave it out"),
        (Upload("notes.jpg", b"words"), "is no picture"),
    ],
)
def test_bad_query_is_refused_with_the_remedy(service, visitor, query, words):
    with pytest.raises(VisitorError, match=words):
        service.search(visitor, query, 4)


@pytest.mark.parametrize("length", [0, 17, 2.5, True])
def test_wrong_length_is_refused(service, visitor, length):
    with pytest.raises(VisitorError, match="from 1 to 16"):
        service.search(visitor, "a dog", length)


# Look inside


def test_look_shows_maps_sizes_and_the_closest_text_first(service, visitor):
    found = service.look(visitor, "gallery-43", 4, ["a yellow banana", "three carrots and a helicopter", ""])
    assert found.maps.maps.shape == (4, 8, 8)
    described = gallery()[43].description
    texts, scores = zip(*found.closeness, strict=True)
    assert set(texts[:2]) == {described, "three carrots and a helicopter"} and texts[2] == "a yellow banana"
    assert list(scores) == sorted(scores, reverse=True) and scores[1] > scores[2] + 0.1
    assert (found.summary_bytes, found.image_bytes) == (4 * 192 * 2, 64 * 192 * 2)
    assert 1000 < found.jpeg_bytes < 10_000


def test_look_without_a_picture_is_refused(service, visitor):
    with pytest.raises(VisitorError, match="No picture is chosen"):
        service.look(visitor, None, 4, [])


def test_heat_map_is_bright_where_the_token_looked():
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1.0
    drawn = heat_map(Image.new("RGB", (80, 80), "white"), heat.numpy(), (0, 0, 80, 80)).convert("L")
    assert drawn.getpixel((150, 10)) > 200 > 130 > drawn.getpixel((10, 150))
