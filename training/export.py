"""`python -m fwd2bot.training.export CHECKPOINT FOLDER`: a trained checkpoint as it lies on the Hub.

Weights are stored in half precision and load in float32; beside them lie the processor, the code that
`trust_remote_code=True` loads, the figures of the evaluation and a model card made from them.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

from .model_card import model_card

EVALUATION = "evaluation.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained Fwd2Bot")
    parser.add_argument("folder", type=Path, help="the Hub folder to write")
    parser.add_argument("--evaluation", type=Path, help="figures that `fwd2bot.training.evaluate --output` wrote")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored weights")
    args = parser.parse_args(arguments)
    export(args.checkpoint, args.folder, args.evaluation, getattr(torch, args.dtype))
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"wrote {args.folder} ({size / 1e6:.1f} MB)")


def export(checkpoint: Path, folder: Path, evaluation: Path | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Write the Hub folder of a trained checkpoint.

    Args:
        checkpoint: what the training saved.
        folder: is made, or brought up to date in place.
        evaluation: JSON of `fwd2bot.training.evaluate`. Default: the figures that lie in the checkpoint, if any.

    Raises:
        ValueError: a weight does not fit `dtype`, or the evaluation is of another model.
    """
    model = Fwd2BotForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = Fwd2BotProcessor.from_pretrained(checkpoint)
    evaluation = checkpoint / EVALUATION if evaluation is None else evaluation
    results = json.loads(evaluation.read_text()) if evaluation.is_file() else None
    if results is not None and results.get("fingerprint") != model.fingerprint:
        raise ValueError(
            f"{evaluation} is of the model {results.get('fingerprint')}, but {checkpoint} is {model.fingerprint}. "
            "Evaluate this checkpoint."
        )
    largest = max(parameter.abs().max().item() for parameter in model.parameters())
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"a weight of {largest:.4g} does not fit {dtype}; export with --dtype float32")
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    # Where it was trained is nobody's business, and the copy of the backbone inside is what counts.
    model.config._name_or_path = model.config.backbone_name_or_path = ""
    model.config.backbone_config._name_or_path = ""
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    if results is None:  # the card and figures of an earlier model would be false of this one
        for name in ("README.md", EVALUATION):
            (folder / name).unlink(missing_ok=True)
    else:
        if evaluation.resolve() != (folder / EVALUATION).resolve():
            shutil.copyfile(evaluation, folder / EVALUATION)
        (folder / "README.md").write_text(model_card(results, model), encoding="utf-8")


if __name__ == "__main__":
    main()
