"""What the service hands to the page: files that were added, an exchange, what is inside a picture."""

from dataclasses import dataclass, field

from fwd2bot.training.attention_maps import AttentionMaps

from .comparison import Answer
from .visitors import Picture, Turn


@dataclass
class Added:
    """What became of files.

    Args:
        pictures: the new ones. problems: what is wrong with files that were not taken.
        again: names of files, each with the picture of this visitor that it is the same as.
    """

    pictures: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    again: list[tuple[str, Picture]] = field(default_factory=list)


@dataclass(frozen=True)
class Exchange:
    """A question while it is answered: about which pictures, from their summaries, and uncompressed.

    Args:
        note: why there is no uncompressed answer, where there is none.
        complete: whether nothing more comes. remark: a word on where the question stands in the conversation.
    """

    question: str
    pictures: list[Picture]
    summary: Answer
    uncompressed: Answer | None = None
    note: str | None = None
    earlier: tuple[Turn, ...] = ()
    complete: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Look:
    """What is inside a summary.

    Args:
        maps: where each summary token looked; None with a `note` where that is not known of the backbone.
        closeness: cosine of the picture with each text.
        summary_bytes: two a number. image_bytes: of all image tokens, likewise. jpeg_bytes: at quality 75.
    """

    picture: Picture
    maps: AttentionMaps | None
    note: str | None
    closeness: list[tuple[str, float]]
    summary_bytes: int
    image_bytes: int
    jpeg_bytes: int
