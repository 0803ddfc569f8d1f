"""Figures of answers as the field's benchmarks take them: VQA's soft accuracy, yes and no, groups, categories."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .validation import normalised

TWO_SIDED = (("yes", "no"), ("true", "false"))  # of which the first is what precision and recall are about
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = ("a", "an", "the")
ENOUGH = 3  # annotators who agree with an answer that is wholly right


@dataclass
class Asked:
    """What was to be answered.

    Args:
        expected: the one answer. answers: those of all annotators, if there were several.
        group: rows that count only together. category: what figures are given for apart.
    """

    expected: str
    answers: list[str] = field(default_factory=list)
    group: str | None = None
    category: str | None = None


def answer_figures(
    given: Sequence[str], asked: Sequence[Asked], sides: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Shares between 0 and 1, each where the questions have what it needs.

    - `exact_match`: the answer equals the expected one but for case, white space around it and final punctuation.
    - `vqa_accuracy`, if every question has several annotators' answers: see `vqa_accuracy`.
    - `yes_no`, if all expected answers are yes or no, or all are true or false: see `yes_no_figures`.
    - `consistency`, if questions have groups: share of the groups all of whose questions are answered right (NLVR);
      yes or no, and true or false, by the first word, as for `yes_no`.
    - `by_category`: all of these for each category by itself.

    Args:
        sides: what is expected is one of these two, though perhaps the same one always; default: as it is found.

    Raises:
        ValueError: answers and questions differ in number, or there is none.
    """
    if len(given) != len(asked) or not asked:
        raise ValueError(f"Need as many answers as questions, at least one; got {len(given)} for {len(asked)}.")
    right = [normalised(one) == normalised(question.expected) for one, question in zip(given, asked, strict=True)]
    figures: dict[str, Any] = {"exact_match": sum(right) / len(right)}
    if all(len(question.answers) > 1 for question in asked):
        soft = [vqa_accuracy(one, question.answers) for one, question in zip(given, asked, strict=True)]
        figures["vqa_accuracy"] = sum(soft) / len(soft)
    expected = {normalised(question.expected) for question in asked}
    both = next((each for each in TWO_SIDED if expected == set(each)), None)
    if both is not None:
        figures["yes_no"] = yes_no_figures(given, [question.expected for question in asked], both)
    sides = sides or both
    if sides is not None:
        right = [_first_word(one) == normalised(question.expected) for one, question in zip(given, asked, strict=True)]
    groups = defaultdict(list)
    for one, question in zip(right, asked, strict=True):
        if question.group is not None:
            groups[question.group].append(one)
    if groups:
        figures["consistency"] = sum(map(all, groups.values())) / len(groups)
    categories = sorted({question.category for question in asked if question.category is not None})
    if categories:
        figures["by_category"] = {}
        for category in categories:
            rows = [row for row, question in enumerate(asked) if question.category == category]
            alone = [Asked(q.expected, q.answers, q.group) for q in (asked[row] for row in rows)]
            figures["by_category"][category] = answer_figures([given[row] for row in rows], alone, sides)
    return figures


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """How many annotators agree: wholly right with three, or with all if there are fewer.

    The mean over the annotators, each left out once, of `min(1, agreeing others / 3)`. Compared is what
    `vqa_normalised` leaves.

    Source: VQA, Antol et al., ICCV 2015, and its evaluation code, in which each question has ten answers.
    """
    given, truths = vqa_normalised(answer), [vqa_normalised(truth) for truth in answers]
    agree = [given == truth for truth in truths]
    if len(agree) == 1:
        return float(agree[0])
    enough = min(ENOUGH, len(agree) - 1)
    return sum(min(1.0, (sum(agree) - own) / enough) for own in agree) / len(agree)


def vqa_normalised(text: str) -> str:
    """An answer as VQA's evaluation compares it: lower case, digits for numbers, no articles, no punctuation.

    Apostrophes are dropped on both sides, where VQA's code has a table that puts them into "dont" and the like.
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    text = re.sub(r"(?<=\d),(?=\d)", "", text.replace("'", ""))
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = [str(NUMBERS.index(word)) if word in NUMBERS else word for word in text.split()]
    return " ".join("0" if word == "none" else word for word in words if word not in ARTICLES)


def yes_no_figures(
    given: Sequence[str], expected: Sequence[str], sides: tuple[str, str] = TWO_SIDED[0]
) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", the share of answers that are "yes", and of those that are neither.

    The first word of an answer counts. One that is neither is wrong, and stands with the noes in precision and recall.

    Source: POPE, Li et al., EMNLP 2023 (arXiv 2305.10355).
    """
    said = [_first_word(one) for one in given]
    truth = [normalised(one) for one in expected]
    yes, no = sides
    hits = sum(one == true == yes for one, true in zip(said, truth, strict=True))
    precision, recall = (hits / max(1, answers.count(yes)) for answers in (said, truth))
    return {
        "accuracy": sum(one == true for one, true in zip(said, truth, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_share": said.count(yes) / len(said),
        "neither": sum(one not in (yes, no) for one in said) / len(said),
    }


def _first_word(answer: str) -> str:
    return next(iter(normalised(answer).replace(",", " ").replace(".", " ").split()), "")
