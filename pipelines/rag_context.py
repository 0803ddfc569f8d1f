"""What `fwd2bot-rag` and its chat have in common: what finds pictures, the originals, room in the context, numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from fwd2bot.processing_fwd2bot import adds_special_tokens

from .answer_inputs import is_chat, question_prompt

_NUMBERS = r"\d+(?:(?:\s*,\s*(?:and\s+|or\s+)?|\s+and\s+|\s+or\s+|\s*&\s*)\d+)*"
_NAMED = re.compile(rf"\b(?:pictures?|images?|photos?)\s+(?:no\.\s*|numbers?\s+|#)?({_NUMBERS})\b", re.IGNORECASE)
_BARE = re.compile(rf"\s*({_NUMBERS})\s*\.?\s*")
_WHICH = re.compile(r"\bwhich\b", re.IGNORECASE)


def question_text(question: Any) -> str:
    """The words of a question: a `str`, or of a chat the last message of the user.

    Raises:
        TypeError, ValueError: for what is no question, or one without words.
    """
    if not isinstance(question, str) and not is_chat(question):
        raise TypeError(f"A question must be a str or a chat (a list of messages), got {type(question).__name__}.")
    text = question if isinstance(question, str) else _last_words(question)
    if not text.strip():
        raise ValueError("The question is empty. Give at least one word.")
    return text


def _last_words(chat: Sequence[Mapping[str, Any]]) -> str:
    content = next((message["content"] for message in reversed(chat) if message["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text" and "text" in part)


def numbered_prompt(question: Any, num_pictures: int, processor: Any) -> str:
    """`question_prompt`, in which each of several pictures has its number in front: "picture 1: <image>".

    A prompt stays as it is if its chat template numbers them itself ("Picture 1: <image>"), if the question marks the
    places of its pictures, or if the template takes all pictures out of the text, as that of LLaVA-1.5 does: a number
    would not be where its picture is.
    """
    plain = question_prompt(question, num_pictures, processor)
    token = processor.image_token
    if num_pictures < 2 or _is_numbered(plain, token):
        return plain
    chat = [{"role": "user", "content": question}] if isinstance(question, str) else [dict(part) for part in question]
    contents = [message["content"] for message in chat]
    if any(part["type"] == "image" for content in contents if not isinstance(content, str) for part in content):
        return plain
    first = next(message for message in chat if message["role"] == "user")
    words = first["content"]
    marked: list[dict[str, str]] = []
    for number in range(1, num_pictures + 1):
        marked += [{"type": "text", "text": f"picture {number}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    first["content"] = [*marked, *([{"type": "text", "text": words}] if isinstance(words, str) else words)]
    numbered = question_prompt(chat, num_pictures, processor)
    return numbered if _is_numbered(numbered, token) else plain


def _is_numbered(prompt: str, token: str) -> bool:
    """Whether the words in front of each placeholder, back to the one before, end with its number."""
    before = prompt.split(token)[:-1]
    tags = r"(<[^<>\n]*>|\[[^\[\]\n]*\])*"  # with which a family may surround the placeholder
    return all(re.search(rf"\b{number}\b[^\w\n]*{tags}\s*$", part) for number, part in enumerate(before, 1))


def named_pictures(question: str, answer: str, count: int) -> list[int]:
    """The numbers of pictures that an answer names, in 1..count, in its order.

    A reading of the words, in English, and no more: the numbers behind "picture" or "image" ("pictures 1 and 3"), and
    those of an answer that consists of numbers alone ("1 and 3"), if the question asks "which"; asked "how many", the
    same "2" is a count. Whether the model looked at these pictures it does not tell.
    """
    found = _NAMED.findall(answer)
    bare = _BARE.fullmatch(answer)
    if bare and _WHICH.search(question):
        found.append(bare[1])
    numbers = [int(number) for part in found for number in re.findall(r"\d+", part)]
    return [number for number in dict.fromkeys(numbers) if 1 <= number <= count]


def check_room(model: Any, num_tokens: int, settings: Mapping[str, Any], pictures: str) -> None:
    """Raise `ValueError` where a prompt and its answer do not fit into what the model reads.

    Args:
        num_tokens: of the longest prompt, with its pictures in place.
        settings: of `generate()`.
        pictures: what the pictures are in the prompt, for the message.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new = settings.get("max_new_tokens") or 1
    if limit is not None and num_tokens + new > limit:
        raise ValueError(
            f"The prompt has {num_tokens} tokens with its {pictures}, and the answer may have {new}; together the "
            f"model reads at most {limit}. Ask about fewer pictures (top_k, ids), give a smaller max_new_tokens, or, "
            "in a chat, begin a new one."
        )


def backbone_inputs(processor: Any, prompt: str, images: Sequence[Image.Image]) -> Any:
    """What `generate_uncompressed` takes: the prompt with its pictures in full, as the bare backbone reads them."""
    inputs = processor.backbone_processor(
        images=[list(images)],
        text=[prompt],
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor.tokenizer, [prompt]),
        verbose=False,  # callers look at the length themselves
    )
    inputs.pop("labels", None)  # PaliGemma's processor makes some
    return inputs


def read_originals(store: Any, ids: Sequence[str], load_image: Any) -> list[Image.Image]:
    """The pictures that rows of a store were made from, read anew from their sources.

    Raises:
        FileNotFoundError: naming each that is not there, cannot be read, or has another content than it had.
    """
    from .store.sources import Item, hash_pixels, parquet_row, read  # needs LanceDB, which is there when a store is

    originals, unreachable = [], []
    for row in store.get(ids):
        item = Item(row["source"])
        if row["source"] is None:
            item.error = "the store does not know where it lies"
        else:
            try:
                item = read(parquet_row(row["source"]) or item, load_image)
            except (OSError, ValueError) as error:
                item.error = str(error)
        if item.error is None and row["hash"] is not None and item.hash != row["hash"]:
            seen = item.picture and hash_pixels(item.picture)  # rows of pictures that were opened when they were added
            item.error = None if seen == row["hash"] else "its content has changed"
        if item.error is not None:
            unreachable.append(f"{row['id']!r} ({row['source'] or 'no source'}: {item.error})")
        originals.append(item.picture)
    if unreachable:
        raise FileNotFoundError(
            f"fallback='image' reads the originals, and {len(unreachable)} of {len(ids)} cannot be reached: "
            f"{'; '.join(unreachable)}. Bring them back, or ask without fallback, from their summaries."
        )
    return originals
