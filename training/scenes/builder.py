"""The drawn world as a data set of the `datasets` library: made on this machine, without network, and cached."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import datasets

from .captions import short_caption
from .descriptions import describe
from .drawing import render
from .questions import ask
from .scene import scene

_SHARD = 1000  # scenes; shards are what `num_proc` is divided by


@dataclass
class ScenesConfig(datasets.BuilderConfig):
    """How many scenes each split holds (0 leaves it out), how many questions each scene, and whether only shapes are
    drawn, which needs no font."""

    num_train: int = 20_000
    num_validation: int = 1_000
    num_test: int = 2_000
    num_questions: int = 5
    shapes_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_train", "num_validation", "num_test", "num_questions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}; pass a whole number, 0 or more")
        if not isinstance(self.shapes_only, bool):
            raise ValueError(f"shapes_only is {self.shapes_only!r}; pass True or False")
        if self.num_train + self.num_validation + self.num_test == 0:
            raise ValueError("all splits are empty; give num_train, num_validation or num_test 1 scene or more")


class Scenes(datasets.GeneratorBasedBuilder):
    """Pictures with their scene, description, short caption and questions.

    >>> builder = Scenes(num_train=5000, num_test=100)
    >>> builder.download_and_prepare(num_proc=2)
    >>> builder.as_dataset(split="train")[0]["questions"][0]
    """

    # Part of the cache's path: raise it whenever pictures or texts change.
    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ScenesConfig

    def __init__(self, *args, dataset_name: str = "fwd2bot_scenes", **kwargs):
        super().__init__(*args, dataset_name=dataset_name, **kwargs)  # names the cache folder

    def _info(self) -> datasets.DatasetInfo:
        question = {name: datasets.Value("string") for name in ("kind", "text", "answer")}
        return datasets.DatasetInfo(
            description="Drawn pictures of one to six everyday things on a field, with texts about them.",
            features=datasets.Features(
                {
                    "image": datasets.Image(),
                    "scene": datasets.Value("string"),  # JSON, see Scene.from_json
                    "description": datasets.Value("string"),
                    "caption": datasets.Value("string"),
                    "questions": datasets.List(question),
                }
            ),
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        counts = {
            "train": self.config.num_train,
            "validation": self.config.num_validation,
            "test": self.config.num_test,
        }
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"scenes_of": split, "starts": list(range(0, count, _SHARD)), "count": count}
            )
            for split, count in counts.items()
            if count
        ]

    def _generate_examples(self, scenes_of: str, starts: list[int], count: int) -> Iterator[tuple[int, dict]]:
        for start in starts:
            for index in range(start, min(start + _SHARD, count)):
                yield index, self._example(scenes_of, index)

    def _example(self, split: str, index: int) -> dict:
        one = scene(split, index, shapes_only=self.config.shapes_only)
        rng = random.Random(f"texts/{split}/{index}")
        return {
            "image": render(one),
            "scene": one.to_json(),
            "description": describe(one, rng),
            "caption": short_caption(one, rng).text,
            "questions": [vars(question) for question in ask(one, rng, self.config.num_questions)],
        }
