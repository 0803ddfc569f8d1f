"""Questions on what is in a picture, with a "no" for random, popular or closely related things, as in POPE."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SORTS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class PresenceQuestion:
    """Is there `name` in picture number `picture`? `sort`: whose negatives it belongs to."""

    picture: int
    name: str
    sort: str
    answer: str

    def text(self, template: str = "Is there {thing} in the image?") -> str:
        """The question in English, the name with its article."""
        return template.format(thing=f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}")


def presence_questions(
    objects: Sequence[Sequence[str]], per_picture: int = 3, seed: int = 0
) -> list[PresenceQuestion]:
    """Of each sort and picture up to `per_picture` things that are there, and as many that are not.

    Absent things are, of all names in `objects`: "random" drawn alike; "popular" those that most pictures have;
    "adversarial" for each of the things asked about the one that most often stands in a picture with it. A picture
    whose names leave none absent has fewer negatives.

    Args:
        objects: the names of what is in each picture, each once.

    Source: POPE, Li et al., EMNLP 2023 (arXiv 2305.10355), section 5.1. `seed` draws what is asked about.
    """
    frequency = Counter(name for names in objects for name in names)
    popular = _by_count(frequency)
    together: dict[str, Counter] = {name: Counter() for name in frequency}
    for names in objects:
        for name in names:
            together[name].update(other for other in names if other != name)
    ranked = {name: _by_count(counts) for name, counts in together.items()}
    questions = []
    for picture, names in enumerate(objects):
        rng = random.Random(f"presence/{seed}/{picture}")
        there = rng.sample(list(names), min(per_picture, len(names)))
        absent = [name for name in popular if name not in names]
        drawn = {
            "random": rng.sample(sorted(absent), min(len(there), len(absent))),
            "popular": absent[: len(there)],
            "adversarial": [],
        }
        for name in there:
            candidates = [*ranked[name], *absent]
            near = next((o for o in candidates if o not in names and o not in drawn["adversarial"]), None)
            drawn["adversarial"] += [] if near is None else [near]
        for sort in SORTS:
            questions += [PresenceQuestion(picture, name, sort, "yes") for name in there]
            questions += [PresenceQuestion(picture, name, sort, "no") for name in drawn[sort]]
    return questions


def _by_count(counts: Counter) -> list[str]:
    """Names, the most frequent first; equal ones by the alphabet, so that the order does not depend on the rows'."""
    return sorted(counts, key=lambda name: (-counts[name], name))
