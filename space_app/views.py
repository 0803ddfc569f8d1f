"""What the page shows, as HTML that is readable without colours, without pictures and in any width. No Gradio here.

Every text from outside goes through `text`: besides what HTML needs, it hides the brackets and dollar signs that the
page's templates would run.
"""

import base64
import html
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .collection import Hit
from .comparison import MAX_NEW_TOKENS, Answer
from .results import Added, Exchange, Look
from .uploads import encode
from .visitors import Picture

HEAT_SIDE = 160  # pixels of a heat map in the page
_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})


def text(value: object) -> str:
    return html.escape(str(value)).translate(_TEMPLATE)


def message(words: str, kind: str = "alert") -> str:
    """Something that went wrong ("alert", which a screen reader reads out at once) or well ("status")."""
    role = ' role="alert"' if kind == "alert" else ""
    return f'<div class="f2b-message f2b-{kind}"{role}>{text(words)}</div>' if words else ""


def heard(words: str) -> str:
    """What the page shows elsewhere, in words for a screen reader alone."""
    return f'<div class="f2b-heard">{text(words)}</div>'


def completed(exchange: Exchange) -> str:
    other = exchange.uncompressed
    words = f"Answer complete. From the summaries: {exchange.summary.text}{_end(exchange.summary)}."
    return words if other is None else f"{words} Uncompressed: {other.text}{_end(other)}."


def _end(answer: Answer) -> str:
    """The sign of an answer that has no end of its own."""
    return f" … (cut off at {MAX_NEW_TOKENS} tokens)" if answer.cut else ""


def added(files: Added) -> str:
    """What became of the files that a visitor has brought."""
    words = [f"{len(files.pictures)} of your pictures added and compressed."] if files.pictures else []
    words += [f"“{name}” is here already, as “{picture.title}”." for name, picture in files.again]
    return message(" ".join([*words, *files.problems]), "alert" if files.problems else "status")


def image(jpeg: bytes | None, alt: str) -> str:
    """A picture inside the page itself, so that no address serves it."""
    if jpeg is None:
        return f'<span class="f2b-missing" role="img" aria-label="{text(alt)}">the original is out of reach</span>'
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{text(alt)}">'


def tiles(
    pictures: Sequence[Picture], legend: str, group: str, kind: str | None = None, chosen: str | None = None
) -> str:
    """Pictures to look at, or, with `kind` "checkbox" or "radio", to choose from; `chosen` is the id of one."""
    if not pictures:
        return ""
    if kind is None:
        items = [f"<li>{image(one.thumbnail, one.text)}<span>{text(one.title)}</span></li>" for one in pictures]
        return f'<h3>{text(legend)}</h3><ul class="f2b-tiles">{"".join(items)}</ul>'
    items = [
        f'<label><input type="{kind}" name="{group}" value="{text(one.id)}" aria-label="{text(one.name)}"'
        f"{' checked' if one.id == chosen else ''}>"
        f"{image(one.thumbnail, '')}<span>{text(one.title)}</span></label>"
        for one in pictures
    ]
    return (
        f'<fieldset class="f2b-choose"><legend>{text(legend)}</legend><div class="f2b-tiles">{"".join(items)}</div>'
        "</fieldset>"
    )


def tries(examples: Sequence[tuple[str, str | None]], box: str, button: str) -> str:
    """Examples that one click asks: each a text, and the id of the picture that it is about.

    Args:
        box, button: selectors of the text field and of the button that takes what is in it.
    """
    if not examples:
        return ""
    items = [
        f'<button type="button" class="f2b-try" data-words="{text(words)}" data-picture="{text(picture or "")}" '
        f'data-box="{box}" data-button="{button}">{text(words)}</button>'
        for words, picture in examples
    ]
    return f'<div class="f2b-tries"><span>Try</span>{"".join(items)}</div>'


def hits(found: Sequence[Hit], length: int) -> str:
    """The hits from the best on, with their scores."""
    if not found:
        return ""
    items = [
        f"<li>{image(hit.picture.thumbnail, hit.picture.text)}<span>{number}. {text(hit.picture.title)}</span>"
        f"<span>score {hit.score:.3f}</span>{bar(max(0.0, hit.score))}</li>"
        for number, hit in enumerate(found, 1)
    ]
    return (
        f'<h3 id="f2b-hits">The best {len(found)} at k = {length}</h3>'
        f'<ol class="f2b-tiles" aria-labelledby="f2b-hits">{"".join(items)}</ol>'
    )


def bar(share: float) -> str:
    return f'<span class="f2b-bar" aria-hidden="true"><i style="width:{100 * min(1.0, share):.1f}%"></i></span>'


def conversation(exchange: Exchange) -> str:
    """What was asked and answered, from the summaries and uncompressed side by side."""
    about = "".join(
        f"<li>{image(one.thumbnail, one.text)}<span>{text(one.title)}</span></li>" for one in exchange.pictures
    )
    rows = [
        _turn(turn.question, said(turn.answer), turn.uncompressed and said(turn.uncompressed))
        for turn in exchange.earlier
    ]
    if exchange.uncompressed is not None:
        other = said(exchange.uncompressed)
    elif exchange.note:
        other = f"no uncompressed answer: {exchange.note}"
    else:
        other = None if exchange.summary.done else "…"
    if exchange.remark:
        rows.append(f'<p class="f2b-note">{text(exchange.remark)}</p>')
    rows.append(_turn(exchange.question, said(exchange.summary), other))
    return f'<h3>About</h3><ul class="f2b-tiles f2b-small">{about}</ul>{"".join(rows)}'


def said(answer: Answer) -> str:
    return (answer.text or "…") + _end(answer)


def _turn(question: str, answer: str, uncompressed: str | None) -> str:
    other = "not asked" if uncompressed is None else uncompressed
    return (
        f'<section class="f2b-turn"><p class="f2b-question">{text(question)}</p><div class="f2b-pair">'
        f'<div><h4>From the summaries</h4><p class="f2b-answer">{text(answer)}</p></div>'
        f'<div><h4>Uncompressed</h4><p class="f2b-answer">{text(other)}</p></div></div></section>'
    )


def comparison(exchange: Exchange) -> str:
    """What the two answers cost, as a table with bars."""
    one, other = exchange.summary, exchange.uncompressed
    if not one.done:
        return ""
    rows = [
        _compared("tokens for the pictures", one, other, "image_tokens", lambda value: f"{value:,}"),
        _compared("bytes for the pictures", one, other, "image_bytes", size),
        _compared(
            "time to the first token", one, other, "first_token_seconds", lambda value: f"{1000 * value:.0f} ms"
        ),
        _compared("cache of the prompt", one, other, "cache_bytes", size),
    ]
    table = (
        '<table class="f2b-table"><caption>What the last answer cost. Bytes at two a number; the cache holds keys '
        "and values.</caption><thead><tr><td></td><th scope=col>from the sum&shy;maries</th>"
        f"<th scope=col>uncom&shy;pressed</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    return _saving(one, other) + table + _why_later(one, other)


def _saving(one: Answer, other: Answer | None) -> str:
    """The comparison in a line."""
    if other is None or not one.image_tokens or other.image_tokens <= one.image_tokens:
        return ""
    return (
        f'<p class="f2b-saving">{one.image_tokens} tokens stand for what are {other.image_tokens} uncompressed: '
        f"<b>{other.image_tokens / one.image_tokens:.3g} times less</b> to store and to read.</p>"
    )


def _why_later(one: Answer, other: Answer | None) -> str:
    """What there is to say where the summaries, which are to save time, took longer to the first token."""
    if other is None or None in (one.first_token_seconds, other.first_token_seconds):
        return ""
    if one.first_token_seconds <= other.first_token_seconds:
        return ""
    return (
        '<p class="f2b-note">Here the first token came later from the summaries, although '
        f"{other.image_tokens - one.image_tokens} tokens were left out. A time is of this one answer, with whatever "
        "else the machine did; tokens, bytes and cache are the same each time.</p>"
    )


def _compared(name: str, one: Answer, other: Answer | None, key: str, shown) -> str:
    values = [getattr(one, key), None if other is None else getattr(other, key)]
    most = max([value for value in values if value is not None], default=0) or 1
    cells = "".join(
        "<td>–</td>" if value is None else f"<td>{shown(value)}{bar(value / most)}</td>" for value in values
    )
    return f"<tr><th scope=row>{name}</th>{cells}</tr>"


def size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def looked(found: Look) -> str:
    """Heat maps, closeness and sizes of a picture."""
    picture, parts = found.picture, []
    parts.append(
        f'<figure class="f2b-figure">{image(picture.jpeg, picture.text)}<figcaption>{text(picture.name)}</figcaption>'
        "</figure>"
    )
    most = max(found.jpeg_bytes, found.image_bytes, found.summary_bytes)
    sizes = [
        ("summary", found.summary_bytes),
        ("JPEG, quality 75", found.jpeg_bytes),
        ("all image tokens", found.image_bytes),
    ]
    rows = "".join(
        f"<tr><th scope=row>{name}</th><td>{size(count)}{bar(count / most)}</td></tr>" for name, count in sizes
    )
    parts.append(
        f'<table class="f2b-table"><caption>What is stored of it, vectors at two bytes a number'
        f"</caption><tbody>{rows}</tbody></table>"
    )
    if found.closeness:
        rows = "".join(
            f"<tr><th scope=row>{text(words)}</th><td>{score:.3f}{bar(max(0.0, score))}</td></tr>"
            for words, score in found.closeness
        )
        parts.append(
            f'<table class="f2b-table"><caption>How close the picture is to each text (cosine)</caption>'
            f"<tbody>{rows}</tbody></table>"
        )
    if found.maps is None:
        parts.append(message(f"No heat maps: {found.note}", "status"))
    else:
        original = picture.image()
        items = []
        for index, heat in enumerate(found.maps.maps.numpy()):
            share = float(found.maps.picture_share[index])
            row, column = np.unravel_index(int(heat.argmax()), heat.shape)
            place = f"most at row {row + 1}, column {column + 1} of {heat.shape[0]} x {heat.shape[1]}"
            words = f"summary token {index + 1} looked {place}"
            drawn = encode(heat_map(original, heat, found.maps.box), 85)
            items.append(
                f"<li>{image(drawn, words)}<span>token {index + 1}</span><span>{share:.0%} on the picture</span></li>"
            )
        parts.append(
            "<h3>Where each summary token looked</h3><p>Bright is where the token read most, as the mean over all "
            "layers and heads; the rest of its attention went to the prompt and to the tokens before it.</p>"
            f'<ol class="f2b-tiles">{"".join(items)}</ol>'
        )
    return "".join(parts)


def heat_map(picture: Image.Image, heat: np.ndarray, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture, dimmed and red where a token looked little, bright where it looked most.

    Args:
        heat: `(rows, columns)` non-negative. box: the part of the picture, in its pixels, that the rows cover.
    """
    scale = HEAT_SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    values = Image.fromarray((heat / max(heat.max(), 1e-12)).astype(np.float32))  # mode F
    left, top, right, bottom = (round(edge * scale) for edge in box)
    values = values.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    whole = Image.new("F", (width, height), 0.0)
    whole.paste(values, (left, top))
    bright = np.asarray(whole).clip(0, 1)[:, :, None]  # (height, width, 1)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    dim = 0.25 * pixels.mean(2, keepdims=True) + np.array([30.0, 20.0, 60.0])
    return Image.fromarray((bright * pixels + (1 - bright) * dim).clip(0, 255).astype(np.uint8))
