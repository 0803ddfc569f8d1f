"""The `data` section of a recipe that trains on data sets: its sources, and what a sample of them becomes."""

import dataclasses
from dataclasses import dataclass, field

TRAINING_FORMATS = ("llava", "messages", "captions", "vqa")
EVALUATION_FORMATS = ("sugarcrepe", "winoground", "objects")  # that `evaluate --data` judges by, and none learns from
FORMATS = (*TRAINING_FORMATS, *EVALUATION_FORMATS)
USES = ("both", "ar", "contrastive")
ANSWERS = ("vote", "join")
# What a column is for, and the names that it is looked for under unless `columns` says otherwise.
COLUMNS = {
    "llava": {"id": ("id",), "image": ("image", "images"), "conversations": ("conversations",)},
    "messages": {"id": ("id",), "image": ("images", "image"), "messages": ("messages",)},
    "captions": {
        "id": ("id", "__key__"),
        "image": ("image",),
        "captions": ("captions", "caption", "txt", "text"),
        "negatives": ("negatives",),
    },
    "vqa": {
        "id": ("id", "question_id"),
        "image": ("image", "image_id"),
        "question": ("question",),
        "answer": ("answer", "answers", "multiple_choice_answer"),
    },
    "sugarcrepe": {
        "id": ("id",),
        "image": ("filename", "image"),
        "captions": ("caption",),
        "negatives": ("negative_caption",),
        "category": ("category",),
    },
    "winoground": {
        "id": ("id",),
        "image_0": ("image_0",),
        "image_1": ("image_1",),
        "caption_0": ("caption_0",),
        "caption_1": ("caption_1",),
    },
    "objects": {"id": ("id",), "image": ("image",), "objects": ("objects",)},
}
# In every format, where `columns` names them: rows that count only together, and what figures are given for apart.
EVALUATION_COLUMNS = ("group", "category")
OPTIONAL_COLUMNS = {"captions": ("id", "negatives"), "sugarcrepe": ("id", "category")}  # of the others the id alone


@dataclass
class SourceRecipe:
    """One data set of the mixture."""

    name: str  # in logs and errors
    format: str  # one of FORMATS
    path: str  # a file, a glob, a folder of `datasets` or of files, or a Hub id
    images: str | None = None  # the folder of image names; or a table of images, joined by columns.image_id
    columns: dict[str, str] = field(default_factory=dict)  # {what it is for: its name in the data}
    split: str = "train"
    subset: str | None = None  # the configuration of a Hub data set that has several
    revision: str | None = None  # of a Hub data set
    streaming: bool = False  # read in order and shuffled in a buffer, instead of a table on disk with random access
    shuffle_buffer: int = 1000  # rows, pictures undecoded, for every worker; streams only
    weight: float = 1.0  # share of the samples, relative to the weights of the other sources
    use: str = "both"  # one of USES
    question_suffix: str = ""  # vqa: after every question, such as "\nAnswer with a single word or phrase."
    license: str | None = None  # of the data, for the model card
    answers: str = "vote"  # vqa with a list of answers: "vote" takes the most frequent, "join" all of them

    def __post_init__(self):
        where = f"data.sources[{self.name!r}]"
        for key, allowed in (("format", FORMATS), ("use", USES), ("answers", ANSWERS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{where}.{key} is {getattr(self, key)!r}; choose one of {', '.join(allowed)}")
        for key in ("name", "path"):
            if not getattr(self, key).strip():
                raise ValueError(f"{where}.{key} is empty; give one")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"{where}.weight is {self.weight}; give a number above 0, or leave the source out")
        if self.shuffle_buffer < 1:
            raise ValueError(f"{where}.shuffle_buffer is {self.shuffle_buffer}; give 1 (no shuffling) or more rows")
        allowed = [*COLUMNS[self.format], *EVALUATION_COLUMNS, "image_id"]
        unknown = sorted(set(self.columns) - set(allowed))
        if unknown:
            raise ValueError(
                f"unknown key {', '.join(unknown)} in {where}.columns; a source of format {self.format} has "
                f"{', '.join(allowed)}"
            )
        if self.use == "contrastive" and self.format != "captions":
            raise ValueError(
                f"{where}.use is contrastive, which takes captions, but its format is {self.format}; use ar, or give "
                "the captions as a source of format captions"
            )
        if self.streaming and "image_id" in self.columns and not self.images:
            raise ValueError(f"{where}.columns.image_id joins with a table of images; name it in {where}.images")


@dataclass
class SourcesData:
    """A mixture of data sets."""

    sources: list[SourceRecipe] = field(default_factory=list)
    seed: int = 0
    # Captions of fewer tokens go to the contrastive loss, longer ones are learnt word by word: long captions spoil the
    # contrastive loss (VladVA, arXiv 2412.04378). null: every caption goes to both.
    contrastive_max_tokens: int | None = 30
    captions_per_image: int = 1  # drawn for the contrastive side, if an image has several
    caption_prompts: list[str] = field(default_factory=lambda: ["Describe the image."])  # before captions learnt by AR
    # Tokens of a conversation, an image counted as one; its last turns are left out until it fits.
    max_length: int = 2048
    max_image_side: int | None = None  # pixels; larger pictures are scaled down before the backbone's own processor
    max_broken: int = 100  # broken pictures and malformed rows that each process leaves out; one more is an error
    tokenizer_texts: int = 20_000  # kind backbone from scratch: samples whose texts its tokenizer is trained on

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data.sources is empty; list at least one source with name, format and path")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.sources has {', '.join(twice)} more than once; give every source its own name")
        for key, least in (("captions_per_image", 1), ("max_length", 8), ("max_broken", 0), ("tokenizer_texts", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} is {getattr(self, key)}; give {least} or more")
        for key, least in (("contrastive_max_tokens", 1), ("max_image_side", 16)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"data.{key} is {value}; give {least} or more, or null for no limit")
        if not self.caption_prompts or not all(isinstance(p, str) and p.strip() for p in self.caption_prompts):
            raise ValueError(f"data.caption_prompts is {self.caption_prompts!r}; give at least one instruction")


def check_trainable(section: str, sources: list[SourceRecipe]) -> None:
    """Raise ValueError for a source in a format that nothing is learnt from."""
    for source in sources:
        if source.format in EVALUATION_FORMATS:
            raise ValueError(
                f"{section}.sources[{source.name!r}].format is {source.format}, which is for `evaluate --data` alone; "
                f"choose one of {', '.join(TRAINING_FORMATS)}, or leave the source out"
            )


def for_backbone(data: SourcesData) -> SourcesData:
    """The same data for a plain backbone, which has no contrastive side: every caption is learnt word by word.

    Raises ValueError for a source that is marked for the contrastive side alone.
    """
    alone = [source.name for source in data.sources if source.use == "contrastive"]
    if alone:
        raise ValueError(
            f"data.sources[{alone[0]!r}].use is contrastive, but a recipe of kind backbone has no contrastive side; "
            "use ar or both, or leave the source out"
        )
    return dataclasses.replace(data, sources=[dataclasses.replace(source, use="ar") for source in data.sources])
