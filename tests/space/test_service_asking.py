"""Asking the service of the Space: answers, conversations, what ends them. Without a browser."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fwd2bot.pipelines.embedded import gallery, showcase
from fwd2bot.space_app import comparison
from fwd2bot.space_app.collection import Shipped
from fwd2bot.space_app.service import Service
from fwd2bot.space_app.uploads import Upload, VisitorError
from fwd2bot.space_app.visitors import ConversationEndedError


def last(stream):
    return list(stream)[-1]


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


class Clock:
    """In place of the module `time`: stands where it is set, and counts how often it was read."""

    now, reads = 0.0, 0

    def perf_counter(self):
        self.reads += 1
        return self.now

    def go_to(self, now):
        """Returns when it has been read there."""
        self.now, before = now, self.reads
        for _ in range(2000):
            if self.reads >= before + 3:  # also by one that had read it just before
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"nobody has read the clock at {now}")


def test_time_that_an_answer_waits_for_its_place_is_none_that_its_token_takes(service, visitor, monkeypatch):
    generate, begun, go, clock = service.model.generate_from_summary, threading.Event(), threading.Event(), Clock()

    def waits(summary, **kwargs):
        begun.set()
        assert go.wait(60)
        return generate(summary, **kwargs)

    monkeypatch.setattr(comparison, "time", clock)
    monkeypatch.setattr(service.model, "generate_from_summary", waits)
    for _ in range(service.concurrency):
        assert service._places.acquire(timeout=20)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(last, service.ask(visitor, "Is it?", ["gallery-43"], 4, uncompressed=False))
        clock.go_to(0)
        clock.go_to(comparison.STEP_SECONDS - 1)
        service._places.release(service.concurrency)
        assert begun.wait(20)
        clock.go_to(2 * comparison.STEP_SECONDS - 2)
        go.set()
        assert answer.result(timeout=60).complete


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
