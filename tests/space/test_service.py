"""The service without its page: a visitor's pictures, search, questions, looking inside, bad input, many at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from space_files import upload

from fwd2bot.pipelines.embedded import gallery, showcase
from fwd2bot.space_app import comparison, visitors
from fwd2bot.space_app.collection import Shipped
from fwd2bot.space_app.service import Service
from fwd2bot.space_app.uploads import Upload, VisitorError
from fwd2bot.space_app.views import heat_map
from fwd2bot.space_app.visitors import ConversationEndedError, SupersededError


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
    monkeypatch.setattr(service.model, "compress", None)
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


# Ask


def test_question_is_answered_from_the_summary_and_uncompressed_with_their_costs(service, visitor):
    one = showcase()["questions"][0]
    stream = list(service.ask(visitor, one["text"], [f"gallery-{one['file'][:2]}"], 8))
    done = stream[-1]
    assert done.summary.text == done.uncompressed.text == one["answer"]
    assert (done.summary.image_tokens, done.uncompressed.image_tokens) == (8, 64)
    assert (done.summary.image_bytes, done.uncompressed.image_bytes) == (8 * 192 * 2, 64 * 192 * 2)
    assert done.uncompressed.prompt_tokens - done.summary.prompt_tokens == 56
    # 6 layers of keys and values, 192 numbers of 4 bytes each, for every token of the prompt
    for answer in (done.summary, done.uncompressed):
        assert answer.cache_bytes == answer.prompt_tokens * 6 * 2 * 192 * 4
        assert 0 < answer.first_token_seconds < 60
    assert stream[0].uncompressed is None and not stream[0].summary.done


def test_answers_are_those_of_the_model(service, visitor):
    """The same greedy tokens as the pipeline gives."""
    from transformers import pipeline

    pipe = pipeline("fwd2bot-answer", model=service.model, processor=service.processor, device="cpu")
    for number in (3, 17):
        picture = service.collection.get(f"gallery-{number:02d}")
        for question in gallery()[number].questions[:3]:
            found = last(service.ask(visitor, question.text, [picture.id], 4, uncompressed=False))
            service.new_conversation(visitor)
            [meant] = pipe(question.text, summary=picture.summary.truncate(4), max_new_tokens=48, do_sample=False)
            assert found.summary.text == meant["generated_text"]


def test_follow_up_goes_on_with_the_conversation_until_other_pictures_are_chosen(service, visitor):
    first = last(service.ask(visitor, "How many carrots are in the picture?", ["gallery-43"], 8))
    second = last(service.ask(visitor, "What colour is the background?", ["gallery-43"], 8))
    assert [turn.question for turn in second.earlier] == [first.question]
    assert second.earlier[0].answer.text == first.summary.text
    assert second.summary.prompt_tokens > first.summary.prompt_tokens
    assert last(service.ask(visitor, "What is it?", ["gallery-44"], 8)).earlier == ()


def test_question_finds_its_picture_and_the_follow_up_stays_with_it(service, visitor):
    first = last(service.ask(visitor, "How many snowmen are on the blue field?", [], 8, find=1))
    assert [picture.id for picture in first.pictures] == ["gallery-47"]
    second = last(service.ask(visitor, "Is there a dog?", [], 8, find=1))
    assert second.pictures == first.pictures and len(second.earlier) == 1


def test_question_searches_anew_after_ticked_pictures_and_for_another_number(service, visitor):
    last(service.ask(visitor, "How many carrots are in the picture?", ["gallery-43"], 8, uncompressed=False))
    snow = "How many snowmen are on the blue field?"
    found = last(service.ask(visitor, snow, [], 8, find=1, uncompressed=False))
    assert [picture.id for picture in found.pictures] == ["gallery-47"] and found.earlier == ()
    more = last(service.ask(visitor, "How many carrots are in the picture?", [], 8, find=3, uncompressed=False))
    assert len(more.pictures) == 3 and more.earlier == ()


def test_question_tells_where_it_stands_in_the_conversation(service, tiny_service, visitor):
    def remark(served, one):
        return last(served.ask(visitor, "What is it?", [one], 4, uncompressed=False)).remark

    told = [remark(service, one) for one in ("gallery-01", "gallery-01", "gallery-02")]
    assert told[0] == "" and "from the second one on its answers are often wrong" in told[1]
    assert told[2] == "A new conversation, since the pictures are others."
    assert [remark(tiny_service, "gallery-01") for _ in range(2)] == ["", ""]  # of which nothing is known


def test_answer_that_takes_too_long_is_given_up_with_the_limit(service, visitor, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(comparison, "STEP_SECONDS", 0.2)
    monkeypatch.setattr(service.model, "generate_from_summary", lambda *given, **more: go.wait(60))
    with pytest.raises(VisitorError, match="No word came within 0.2 seconds, so the answer was given up. Ask again l"):
        last(service.ask(visitor, "What is it?", ["gallery-43"], 4))
    go.set()


def test_time_that_an_answer_waits_for_its_place_is_none_that_its_token_takes(service, visitor, monkeypatch):
    generate, slept = service.model.generate_from_summary, threading.Event()

    def slowly(summary, **kwargs):  # the place is taken: from here on a token may take as long as it may
        slept.wait(0.7)
        return generate(summary, **kwargs)

    monkeypatch.setattr(comparison, "STEP_SECONDS", 1)
    monkeypatch.setattr(service.model, "generate_from_summary", slowly)
    for _ in range(service.concurrency):
        assert service._places.acquire(timeout=20)
    answer = service.ask(visitor, "Is there a dog?", ["gallery-43"], 4, uncompressed=False)
    timer = threading.Timer(0.7, service._places.release, [service.concurrency])
    timer.start()
    assert last(answer).complete
    timer.join()


def test_visitor_who_leaves_ends_the_answer_that_is_made(service, visitor):
    stream = service.ask(visitor, "Describe the picture.", ["gallery-43"], 4)
    next(stream)
    service.visitors.leave(visitor)
    with pytest.raises(ConversationEndedError):
        last(stream)


def test_model_is_run_by_no_more_at_once_than_it_has_places(shared_fwd2bot, tiny_processor, visitor, monkeypatch):
    found = Service(shared_fwd2bot, tiny_processor, Shipped(gallery()[:2]), concurrency=1)
    compress, inside, most = shared_fwd2bot.compress, [], []

    def counted(**inputs):
        inside.append(1)
        most.append(len(inside))
        try:
            return compress(**inputs)
        finally:
            inside.pop()

    monkeypatch.setattr(shared_fwd2bot, "compress", counted)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: found.search(f"{visitor} {number}", "a dog", 4), range(8)))
    assert most == [1] * 8


def test_chosen_pictures_together_with_find_are_refused(service, visitor):
    with pytest.raises(
        VisitorError, match=r"chosen \(1\), and the question shall find some \(2\): only one.* Untick yours"
    ):
        next(service.ask(visitor, "What is it?", ["gallery-43"], 8, find=2))


def test_several_pictures_are_asked_about_together(service, visitor):
    done = last(service.ask(visitor, "Which picture shows carrots?", ["gallery-43", "gallery-44"], 4))
    assert (done.summary.image_tokens, done.uncompressed.image_tokens) == (8, 128)


def test_new_conversation_ends_an_answer_before_its_next_token(service, visitor, monkeypatch):
    """Also one whose first token takes long: the model is left alone with the step that it is at."""
    begun, go = threading.Event(), threading.Event()

    def waits(*given, **more):
        begun.set()
        go.wait(60)

    monkeypatch.setattr(service.model, "generate_from_summary", waits)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(last, service.ask(visitor, "What is it?", ["gallery-43"], 4))
        assert begun.wait(20)
        service.new_conversation(visitor, 1)
        with pytest.raises(ConversationEndedError):
            answer.result(timeout=20)  # while the model is still at it
        places = service._places
        assert places.acquire(timeout=20) and not places.acquire(timeout=0.1)  # of two, and it still holds the other
        go.set()
        assert places.acquire(timeout=20)
        places.release(2)
    assert service.visitors._visitors[visitor].conversation.turns == []


def test_question_of_an_older_conversation_is_not_answered(service, visitor):
    service.new_conversation(visitor, 2)
    with pytest.raises(ConversationEndedError):
        last(service.ask(visitor, "What is it?", ["gallery-43"], 4, number=1))
    done = last(service.ask(visitor, "What is it?", ["gallery-43"], 4, number=2, uncompressed=False))
    assert done.complete and done.earlier == ()


def test_question_that_overtakes_the_new_conversation_it_belongs_to_is_its_first(service, visitor):
    last(service.ask(visitor, "What is it?", ["gallery-43"], 4, uncompressed=False))
    first = last(service.ask(visitor, "What is it?", ["gallery-43"], 4, number=1, uncompressed=False))
    service.new_conversation(visitor, 1)  # comes late, and ends nothing
    second = last(service.ask(visitor, "Is there a dog?", ["gallery-43"], 4, number=1, uncompressed=False))
    assert first.earlier == () and [turn.question for turn in second.earlier] == ["What is it?"]


def test_question_that_was_asked_before_a_fresh_one_and_comes_after_it_is_not_answered(service, visitor):
    def asked(at, **options):
        options = {"asked_at": at, "uncompressed": False, **options}
        return last(service.ask(visitor, "What is it?", ["gallery-43"], 4, **options))

    asked(3.0, fresh=True)
    for fresh in (False, True):
        with pytest.raises(ConversationEndedError):
            asked(2.0, fresh=fresh)
    assert len(asked(4.0).earlier) == 1


def test_answer_that_may_not_be_longer_is_marked_as_cut(service, visitor):
    done = last(service.ask(visitor, "Describe the picture.", ["gallery-43"], 8))
    short = last(service.ask(visitor, "How many carrots are in the picture?", ["gallery-43"], 8))
    assert done.summary.cut or done.uncompressed.cut
    for answer in (done.summary, done.uncompressed, short.summary, short.uncompressed):
        tokens = len(service.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
        assert answer.cut == (tokens >= 47), (tokens, answer)
    assert not short.summary.cut


@pytest.mark.parametrize(
    ("question", "ids", "words"),
    [
        ("", ["gallery-01"], "The question is empty"),
        ("What is it?", [], "No picture is chosen. Tick one"),
        ("What is it?", [f"gallery-{index:02d}" for index in range(6)], "6 pictures are too many"),
        ("What is it?", ["../../etc/passwd"], "There is no picture 'passwd' in this session"),
        ("это что?", ["gallery-01"], "simple English only.*such as “How many carrots"),
    ],
)
def test_bad_question_is_refused_before_any_compute(service, visitor, question, ids, words):
    with pytest.raises(VisitorError, match=words):
        next(service.ask(visitor, question, ids, 4))


def test_prompt_that_is_too_long_is_told_on_each_side(tiny_service, visitor):
    """The tiny model reads 512 tokens, one a byte."""
    with pytest.raises(VisitorError, match="the model reads 512. Begin a new conversation"):
        last(tiny_service.ask(visitor, "x" * 500, ["gallery-00"], 4))
    done = last(tiny_service.ask(visitor, "x" * 430, ["gallery-00"], 1))
    assert done.summary.done and done.uncompressed is None
    assert "the model reads 512" in done.note


def test_closed_stream_stops_the_model(service, visitor, monkeypatch):
    """At the step that it is at; the answer has more than twenty tokens."""
    generate, steps, go = service.model.generate_from_summary, [], threading.Event()

    def waits(ids, scores, **kwargs):
        steps.append(threading.current_thread())
        assert len(steps) < 8 or go.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)

    def slowly(summary, **kwargs):
        kwargs["stopping_criteria"].insert(0, waits)
        return generate(summary, **kwargs)

    monkeypatch.setattr(service.model, "generate_from_summary", slowly)
    stream = service.ask(visitor, "Describe the picture.", ["gallery-43"], 4)
    next(stream)
    stream.close()
    go.set()
    steps[0].join(60)
    assert len(steps) <= 8 and not steps[0].is_alive()
    assert service.visitors._visitors[visitor].busy == 0


def test_ten_visitors_at_once_get_what_they_get_one_after_the_other(service, visitor):
    numbers = range(10)

    def visit(name):
        def run(number):
            session = f"{visitor} {name} {number}"
            own = Upload(f"{number}.png", gallery()[number].path.read_bytes())
            service.add(session, [own])
            question = gallery()[number].questions[number % 3].text
            done = last(service.ask(session, question, ["own-1"], 8))
            hits = service.search(session, gallery()[number].captions[0], 8, top_k=3)
            return done.summary.text, done.uncompressed.text, [hit.picture.title for hit in hits]

        return run

    one_by_one = [visit("alone")(number) for number in numbers]
    with ThreadPoolExecutor(10) as pool:
        at_once = list(pool.map(visit("together"), numbers))
    assert at_once == one_by_one
    assert len({answer for answer, _, _ in one_by_one}) > 3


# Look inside


def test_look_shows_maps_sizes_and_the_closest_text_first(service, visitor):
    found = service.look(visitor, "gallery-43", 4, ["a yellow banana", "three carrots and a helicopter", ""])
    assert found.maps.maps.shape == (4, 8, 8)
    described = gallery()[43].description
    texts, scores = zip(*found.closeness, strict=True)
    assert set(texts[:2]) == {described, "three carrots and a helicopter"} and texts[2] == "a yellow banana"
    assert list(scores) == sorted(scores, reverse=True) and scores[1] > 0.5 > scores[2]
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


def test_question_that_was_given_up_while_it_looked_for_pictures_leaves_the_new_conversation(
    service, visitor, monkeypatch
):
    with service.visitors.visit(visitor) as held:

        def retrieve(*arguments):
            with held.lock:
                [this] = held.running
            this.stop.set()
            held.conversation = fresh
            return ["gallery-43"]

        fresh = held.conversation.__class__()
        monkeypatch.setattr(service, "_retrieve", retrieve)
        with pytest.raises(ConversationEndedError):
            last(service.ask(visitor, "How many are there?", [], 4, find=1, number=0))
        assert held.conversation is fresh
