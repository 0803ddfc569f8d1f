"""What `fwd2bot-answer` is asked: questions, chats and rows, paired with their pictures or summaries.

A *row* is what a user may give: a question with "images" or "summary". An *item* is a row that was checked and whose
prompt was made: `{"question": …, "prompt": str}` with a list "pictures" or with a "summary".
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from .pipeline_batches import (
    check_summary,
    checked_picture,
    count_summaries,
    each_input,
    is_picture,
    is_summary,
)

ROW_COLUMNS = ("question", "text", "images", "image", "summary")  # others of a data set are not even decoded


def is_chat(value: Any) -> bool:
    """Whether `value` is a list of messages, which is one question, not several."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)
    )


def is_one_question(questions: Any) -> bool:
    return isinstance(questions, (str, Mapping)) or is_chat(questions)


def pair_question(question: Any, images: Any, summary: Any) -> Mapping[str, Any]:
    """The row of one question; a row that brings its own pictures stays as it is.

    Raises:
        ValueError: unless the question has either images or a summary, of its own or given beside it.
    """
    if isinstance(question, Mapping) and images is None and summary is None:
        return question
    _check_either(images, summary)
    if isinstance(question, Mapping):
        raise ValueError(
            f"A row with the keys {sorted(map(str, question))} brings its own pictures. Leave out images and summary, "
            "or give the question as a str."
        )
    return {"question": question, "images": images, "summary": summary}


def pair_questions(questions: list[Any], images: Any, summary: Any) -> list[Mapping[str, Any]]:
    """A row for each of several questions.

    Args:
        images: an iterable with an entry (a picture, or a list of them) for each question.
        summary: instead of images a summary of one picture for all questions, one of as many pictures as there are
            questions, or an iterable with a summary for each.

    Raises:
        TypeError, ValueError: where the numbers of questions and of entries differ, naming both.
    """
    if not questions:
        raise ValueError("No question was given: the list is empty.")
    _check_either(images, summary)
    name, values = ("images", images) if summary is None else ("summary", summary)
    if is_summary(values):
        entries = _share_out(values, len(questions))
    elif isinstance(values, (list, tuple)):
        entries = values
    elif isinstance(values, Iterable):
        entries = list(islice(values, len(questions) + 1))  # no further than to see that it is too long
    else:
        raise TypeError(f"{name} for several questions must be a list with an entry for each, got {values!r}.")
    if len(entries) != len(questions):
        raise ValueError(
            f"{len(questions)} question(s) were given with {name} for {len(entries)}. Give one entry for each "
            "question (a list where one is about several pictures), or a single one for all."
        )
    return [
        pair_question(question, **{"images": None, "summary": None, name: entry})
        for question, entry in zip(questions, entries, strict=True)
    ]


def row_to_item(row: Any, processor: Any, summary_width: int) -> dict[str, Any]:
    """Check a row as far as that needs no reading of pictures, and make its prompt.

    Its summary is moved to the CPU, since a worker process cannot hand on what is on an accelerator.

    Raises:
        TypeError, ValueError, FileNotFoundError: for a row without a question or without anything that it is about,
            for an input of the wrong type, or where pictures and placeholders differ in number.
    """
    row = pair_question(row, None, None)  # an error for a question alone
    questions = [row[name] for name in ("question", "text") if row.get(name) is not None]
    if len(questions) != 1:
        raise ValueError(f"A row must have a 'question' (or 'text'), got the keys {sorted(map(str, row))}.")
    question, summary = questions[0], row.get("summary")
    images = row.get("image") if row.get("images") is None else row["images"]
    _check_either(images, summary)
    if summary is not None:
        check_summary(summary, summary_width)
        return {
            "question": question,
            "prompt": question_prompt(question, count_summaries(summary), processor),
            "summary": summary.to("cpu"),
        }
    pictures = _checked_pictures(images)
    return {
        "question": question,
        "prompt": question_prompt(question, len(pictures), processor),
        "pictures": pictures,
    }


def question_prompt(question: Any, num_pictures: int, processor: Any) -> str:
    """The question in the chat template, with a placeholder for each picture.

    The pictures are where the question marks them, and come first where it marks none.

    Raises:
        TypeError, ValueError: for what is no question, or where it marks another number of pictures.
    """
    token = processor.image_token
    chat = _chat(question, token)
    parts = [part for message in chat for part in message["content"]]
    if not any(part["type"] == "image" or token in part.get("text", "") for part in parts):
        first = next((message for message in chat if message["role"] == "user"), None)
        if first is None:
            raise ValueError("The chat has no message of the role 'user'. Add the question as one.")
        first["content"] = [{"type": "image"}] * num_pictures + first["content"]
    if chat[-1]["role"] == "assistant":
        raise ValueError("The chat ends with an answer. Let a message of the role 'user' come last.")
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    found = prompt.count(token)
    if found != num_pictures:
        raise ValueError(
            f"The question has {found} place(s) for pictures (marked by {token!r} or {{'type': 'image'}}), but "
            f"{num_pictures} picture(s) were given. Mark one for each, or none to have them all come first."
        )
    return prompt


def _check_either(images: Any, summary: Any) -> None:
    if (images is None) == (summary is None):
        raise ValueError(
            f"Give images or summary, what the question is about, got {'neither' if images is None else 'both'}. To "
            "ask about both at once, compress the images and join the summaries with Fwd2BotSummary.cat."
        )


def _share_out(summary: Any, num_questions: int) -> list[Any]:
    """The one summary for every question, or each picture's for itself."""
    count = count_summaries(summary)
    return [summary] * num_questions if count == 1 else [summary[index : index + 1] for index in range(count)]


def _checked_pictures(images: Any) -> list[Any]:
    """The pictures of one question, one or several, as a list."""
    images = [images] if is_picture(images) or isinstance(images, Mapping) else images
    pictures = list(each_input(images, checked_picture, "picture"))
    if not pictures:
        raise ValueError("No picture was given: images is empty.")
    return pictures


def _chat(question: Any, token: str) -> list[dict[str, Any]]:
    """A question, a `str` or a chat, as messages with lists of parts, free to be changed."""
    if isinstance(question, str):
        if not question.strip():
            raise ValueError("The question is empty. Give at least one word.")
        return [{"role": "user", "content": [{"type": "text", "text": question}]}]
    if not is_chat(question):
        raise TypeError(f"A question must be a str or a chat (a list of messages), got {type(question).__name__}.")
    return [_message(message, token) for message in question]


def _message(message: Mapping[str, Any], token: str) -> dict[str, Any]:
    """A message with its content as a list of parts."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
    for part in parts:
        if part.get("type") not in ("text", "image") or set(part) - {"type", "text"}:
            raise ValueError(
                "A part of a message must be {'type': 'text', 'text': …} or {'type': 'image'}, got "
                f"{ {key: str(value)[:40] for key, value in part.items()} }. Give the pictures as images or summary."
            )
    if any(token in part.get("text", "") for part in parts):
        raise ValueError(
            f"The text of a message holds {token!r}. Mark the places of pictures with {{'type': 'image'}}."
        )
    return {"role": message["role"], "content": parts}
