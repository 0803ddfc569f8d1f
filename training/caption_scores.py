"""How near generated captions come to the true ones: CIDEr, BLEU, chrF and ROUGE-L.

BLEU and chrF are sacrebleu's, ROUGE-L is rouge-score's; both come with the extra `train`. CIDEr is written here: the
package that has the original code brings 100 MB of Java tools for it.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_N = 4  # words of the longest n-grams of CIDEr
LENGTH_SIGMA = 6.0  # words by which a caption may differ in length before CIDEr falls much


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of one caption for each picture; more is better.

    Args:
        captions: one for each picture, at least two.
        references: the true captions of each picture, one or more.

    Returns:
        "bleu" and "chrf" over all captions together, and "rouge_l", the mean over captions of the F-measure against
        the nearest reference, each 0..1; "cider", see `cider`, 0..10. Case does not count in any.

    Raises:
        ValueError: for captions and references that do not fit. ImportError: without the extra `train`.
    """
    _check(captions, references)
    bleu, chrf, rouge = _scorers()
    longest = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(longest)]
    return {
        "cider": cider(captions, references),
        "bleu": bleu.corpus_score(list(captions), columns).score / 100,
        "chrf": chrf.corpus_score(list(captions), columns).score / 100,
        "rouge_l": sum(
            max(rouge.score(reference, caption)["rougeL"].fmeasure for reference in row)
            for caption, row in zip(captions, references, strict=True)
        )
        / len(captions),
    }


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, the form of CIDEr that the COCO caption evaluation uses; 0..10.

    The cosine of caption and reference as bags of n-grams, which weigh the less the more pictures' references have
    them: mean over n = 1..4, references and pictures, times 10. N-grams that a caption repeats more often than the
    reference do not help it, and a Gaussian of the difference in length lowers it. The weights come from `references`,
    so figures compare on the same pictures only. Words are letters and digits, in lower case, without punctuation
    (COCO splits by the Penn Treebank's rules, which for plain sentences is the same).

    Source: Vedantam, Zitnick and Parikh, CIDEr, CVPR 2015, sections 4 and 8.

    Raises:
        ValueError: for captions and references that do not fit.
    """
    _check(captions, references)
    rows = [[_ngrams(_words(reference)) for reference in row] for row in references]
    pictures_with = Counter(ngram for row in rows for ngram in set().union(*row))
    weights = {ngram: math.log(len(rows) / count) for ngram, count in pictures_with.items()}
    unseen = math.log(len(rows))

    def similarity(caption: Counter, reference: Counter) -> float:
        shared, squares = [0.0] * MAX_N, [[0.0] * MAX_N, [0.0] * MAX_N]
        for ngram, count in caption.items():
            weight, n = weights.get(ngram, unseen), len(ngram) - 1
            shared[n] += min(count, reference[ngram]) * reference[ngram] * weight**2
            squares[0][n] += (count * weight) ** 2
        for ngram, count in reference.items():
            squares[1][len(ngram) - 1] += (count * weights[ngram]) ** 2
        cosines = [dot / math.sqrt(a * b) if a * b else 0.0 for dot, a, b in zip(shared, *squares, strict=True)]
        longer = _num_words(caption) - _num_words(reference)
        return sum(cosines) / MAX_N * math.exp(-(longer**2) / (2 * LENGTH_SIGMA**2))

    total = 0.0
    for caption, row in zip(captions, rows, strict=True):
        own = _ngrams(_words(caption))
        total += sum(similarity(own, reference) for reference in row) / len(row)
    return 10 * total / len(captions)


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(captions, str) or any(isinstance(row, str) for row in references):
        raise ValueError("captions must be a list of str, and references a list of lists of str, one for each.")
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} caption(s) came with references of {len(references)} picture(s).")
    if len(captions) < 2:
        raise ValueError(f"CIDEr needs at least two pictures to weigh words by, got {len(captions)}.")
    without = [index for index, row in enumerate(references) if not len(row)]
    if without:
        raise ValueError(f"Pictures without any reference: {without[:10]}. Give each at least one.")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def _ngrams(words: list[str]) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _num_words(ngrams: Counter) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 1)


def _scorers() -> tuple[Any, Any, Any]:
    """BLEU, chrF and ROUGE-L."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError(
            f'Scores of captions need sacrebleu and rouge-score ({error}). Install them: pip install "fwd2bot[train]"'
        ) from error
    return BLEU(lowercase=True), CHRF(lowercase=True), RougeScorer(["rougeL"])
