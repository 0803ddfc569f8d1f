"""`python -m fwd2bot.training.export CHECKPOINT FOLDER`: a trained checkpoint as it lies on the Hub.

Weights are stored in half precision and load in float32; beside them lie the processor, the code that
`trust_remote_code=True` loads, the figures of the evaluation and a model card made from them.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.folder_fwd2bot import draft_folder

from .model_card import model_card

CARD, EVALUATION = "README.md", "evaluation.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained Fwd2Bot")
    parser.add_argument("folder", type=Path, help="the Hub folder to write")
    parser.add_argument("--evaluation", type=Path, help="figures that `fwd2bot.training.evaluate --output` wrote")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored weights")
    args = parser.parse_args(arguments)
    try:
        export(args.checkpoint, args.folder, args.evaluation, getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"wrote {args.folder} ({size / 1e6:.1f} MB)")


def export(checkpoint: Path, folder: Path, evaluation: Path | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Write the Hub folder of a trained checkpoint, whole or not at all.

    Args:
        checkpoint: what the training saved.
        folder: is made, or brought up to date in place.
        evaluation: JSON of `fwd2bot.training.evaluate`. Default: the figures that lie in the checkpoint, if any;
            without figures there is no card, and those of an earlier export are removed.

    Raises:
        FileNotFoundError: `evaluation` was given and is not there.
        ValueError: a weight is not finite or does not fit `dtype`, or the evaluation is of another model or lacks a
            figure of the card.
    """
    if evaluation is None:
        evaluation = checkpoint / EVALUATION if (checkpoint / EVALUATION).is_file() else None
    elif not evaluation.is_file():
        raise FileNotFoundError(
            f"There is no evaluation {evaluation}. `python -m fwd2bot.training.evaluate --output` writes one; give "
            "none to export without figures."
        )
    model = Fwd2BotForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = Fwd2BotProcessor.from_pretrained(checkpoint)
    card = None if evaluation is None else model_card(_read_evaluation(evaluation, checkpoint, model), model)
    state = _convert(model.state_dict(), dtype)
    # Where it was trained is nobody's business, and the copy of the backbone inside is what counts.
    model.config._name_or_path = model.config.backbone_name_or_path = ""
    model.config.backbone_config._name_or_path = ""
    with draft_folder(folder) as draft:
        model.save_pretrained(draft, state_dict=state)
        processor.save_pretrained(draft)
        if card is not None:
            shutil.copyfile(evaluation, draft / EVALUATION)
            (draft / CARD).write_text(card, encoding="utf-8")
    if card is None:  # the card and figures of an earlier model would be false of this one
        for name in (CARD, EVALUATION):
            (folder / name).unlink(missing_ok=True)


def _read_evaluation(evaluation: Path, checkpoint: Path, model: Fwd2BotForConditionalGeneration) -> dict[str, Any]:
    """The figures, if they are of this model."""
    results = json.loads(evaluation.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or "fingerprint" not in results:
        raise ValueError(
            f"{evaluation} has no entry fingerprint: it is not of a Fwd2Bot. Evaluate {checkpoint} with "
            "fwd2bot.training.evaluate."
        )
    if results["fingerprint"] != model.fingerprint:
        raise ValueError(
            f"{evaluation} is of the model {results['fingerprint']}, but {checkpoint} is {model.fingerprint}. "
            "Evaluate this checkpoint."
        )
    return results


def _convert(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in another dtype, all of them finite."""
    converted = {name: value.to(dtype) for name, value in state.items()}
    for name, value in converted.items():
        if not state[name].isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite weights: the training diverged. Export another checkpoint."
            )
        if not value.isfinite().all():
            largest = state[name].abs().max().item()
            raise ValueError(f"a weight of {largest:.4g} in {name} does not fit {dtype}; export with --dtype float32")
    return converted


if __name__ == "__main__":
    main()
