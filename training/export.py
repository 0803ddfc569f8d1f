"""`python -m fwd2bot.training.export CHECKPOINT FOLDER`: a trained checkpoint as it lies on the Hub, and upload of it.

Beside the weights, in full or adapters alone, lie the processor, the code that `trust_remote_code=True` loads, the
figures of the evaluation and a model card made from them and from the recipe of the run.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import AutoConfig

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.folder_fwd2bot import draft_folder

from .commands import COMMAND, STEPS
from .model_card import CardOptions, is_hub_id, languages_of, model_card
from .push import Destination, check_destination, listing, push
from .recipe import DTYPES

CARD, EVALUATION, RECIPE = "README.md", "evaluation.json", "recipe.json"


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        to = _destination(args)
        if to is not None:
            check_destination(to, sends=not args.dry_run)
        export(
            args.checkpoint,
            args.folder,
            args.evaluation,
            None if args.dtype is None else getattr(torch, args.dtype),
            adapter_only=args.adapter_only,
            recipe=args.recipe,
            base_model=args.base_model,
            base_model_revision=args.base_model_revision,
            options=CardOptions(
                _name(args, to), args.license, languages_of(args.language), repo=None if to is None else to.repo
            ),
        )
        size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
        print(f"wrote {args.folder} ({size / 1e6:.1f} MB)")
        if to is not None and args.dry_run:
            print(listing(args.folder, to))
        elif to is not None:
            print(f"pushed to {push(args.folder, to)}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def export(
    checkpoint: Path,
    folder: Path,
    evaluation: Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    adapter_only: bool = False,
    recipe: Path | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    options: CardOptions | None = None,
) -> None:
    """Write the Hub folder of a trained checkpoint, whole or not at all.

    Args:
        checkpoint: what the training saved, in full or adapters alone.
        folder: is made, or brought up to date in place.
        evaluation: JSON of `fwd2bot.training.evaluate`. Default: the figures that lie in the checkpoint, if any;
            without figures the card says so, and those of an earlier export are removed.
        dtype: of the stored weights. Default: bfloat16 if the checkpoint is in it, else float16.
        adapter_only: leave the backbone out; then its Hub id must be known.
        recipe: `recipe.json` of the run. Default: that in the checkpoint or in the folder above it, if there is one.
        base_model, base_model_revision: where the backbone is on the Hub. Default: what the checkpoint says, if that
            is an id of the Hub.
        options: of the card. Default: the folder's name, and nothing that is not known.

    Raises:
        FileNotFoundError: `checkpoint` is not there, or `evaluation` or `recipe` was given and is not.
        ValueError: `folder` is `checkpoint`, or has a README.md that no export wrote; a weight is not finite or does
            not fit `dtype`; the evaluation is of another model or lacks a figure of the card; adapters alone of a
            backbone that is not on the Hub.
    """
    if folder.resolve() == checkpoint.resolve():
        raise ValueError(
            f"{folder} is the checkpoint itself, whose weights an export would replace by rounded ones. Name another "
            "folder"
        )
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"there is no folder {checkpoint}; give that of a trained one, such as runs/mine/final"
        )
    _check_card(folder / CARD)
    evaluation = _found(evaluation, [checkpoint / EVALUATION], "evaluation", "`fwd2bot.training.evaluate --output`")
    recipe = _found(recipe, [checkpoint / RECIPE, checkpoint.parent / RECIPE], "recipe", "the folder of a run")
    config = AutoConfig.from_pretrained(checkpoint)
    _check_is_fwd2bot(config, checkpoint)
    base = base_model or (config.backbone_name_or_path if is_hub_id(config.backbone_name_or_path) else None)
    if base is not None and not is_hub_id(base):
        raise ValueError(f"--base-model {base!r} is no id of the Hub; give owner/name")
    if adapter_only and base is None:
        raise ValueError(
            "adapters alone need a backbone that whoever loads them can have, but the checkpoint names "
            f"{config.backbone_name_or_path or 'none'!r}. Give its Hub id with --base-model, or export in full"
        )
    options = replace(options or CardOptions(folder.resolve().name), base_model=base)
    if options.license is None and recipe_of_sources(recipe):
        options.license = _backbone_licence(config.backbone_name_or_path, base)
    if dtype is None:
        dtype = torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float16
    loaded_in = torch.bfloat16 if dtype == torch.bfloat16 == config.dtype else torch.float32
    model = Fwd2BotForConditionalGeneration.from_pretrained(checkpoint, dtype=loaded_in)
    processor = Fwd2BotProcessor.from_pretrained(checkpoint)
    results = None if evaluation is None else _read_evaluation(evaluation, checkpoint, model)
    # Where it was trained is nobody's business, and the copy of the backbone inside is what counts.
    model.config._name_or_path = model.config.backbone_config._name_or_path = ""
    model.config.backbone_name_or_path = base if adapter_only else ""
    if base_model is not None:
        model.config.backbone_revision = base_model_revision
    model.config.adapter_only = adapter_only
    card = model_card(model, options, results, _read_run(recipe, checkpoint))
    state = _convert(model.state_dict(), dtype)
    if not adapter_only:
        model.config.backbone_revision = None
    with draft_folder(folder) as draft:
        model.save_pretrained(draft, state_dict=state, adapter_only=adapter_only)
        processor.save_pretrained(draft)
        if evaluation is not None:
            shutil.copyfile(evaluation, draft / EVALUATION)
        (draft / CARD).write_text(card, encoding="utf-8")
    if evaluation is None:  # the figures of an earlier model would be false of this one
        (folder / EVALUATION).unlink(missing_ok=True)


def recipe_of_sources(recipe: Path | None) -> bool:
    """Whether a run's recipe trained on data sets, not on drawn scenes."""
    return recipe is not None and "sources" in json.loads(recipe.read_text(encoding="utf-8"))["data"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained Fwd2Bot")
    parser.add_argument("folder", type=Path, help="the Hub folder to write")
    parser.add_argument("--evaluation", type=Path, help="figures that `fwd2bot.training.evaluate --output` wrote")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the stored weights (default: bfloat16 if the checkpoint is, else float16)",
    )
    parser.add_argument("--adapter-only", action="store_true", help="leave the backbone out, which is on the Hub")
    parser.add_argument("--recipe", type=Path, help="recipe.json of the run (default: that beside the checkpoint)")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="where the backbone is on the Hub")
    parser.add_argument("--base-model-revision", metavar="COMMIT", help="of --base-model")
    parser.add_argument("--name", help="of the model, in the card (default: that of the repository or the folder)")
    parser.add_argument("--license", help="such as apache-2.0 (default: the backbone's, where its card is at hand)")
    parser.add_argument("--language", metavar="CODES", help="of the training, such as en or en,de")
    hub = parser.add_argument_group("upload")
    hub.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hub")
    hub.add_argument("--private", action=argparse.BooleanOptionalAction, help="of a repository that is made now")
    hub.add_argument("--revision", "--branch", dest="branch", help="branch to push to (default: main)")
    hub.add_argument("--message", default="Upload Fwd2Bot", help="of the commit")
    hub.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and send nothing")
    return parser


def _destination(args: argparse.Namespace) -> Destination | None:
    if args.push is None:
        given = [name for name in ("private", "branch") if getattr(args, name) is not None]
        if args.dry_run or given:
            raise ValueError(f"--{(given or ['dry-run'])[0]} is about an upload; give --push OWNER/NAME with it")
        return None
    return Destination(args.push, args.private, args.branch, args.message)


def _name(args: argparse.Namespace, to: Destination | None) -> str:
    return args.name or (to.repo.rpartition("/")[2] if to is not None else args.folder.resolve().name)


def _check_is_fwd2bot(config: Any, checkpoint: Path) -> None:
    if config.model_type != "fwd2bot":
        raise ValueError(f"{checkpoint} is a {config.model_type}, not a Fwd2Bot; give the folder of a trained one")


def _check_card(card: Path) -> None:
    """Raise `ValueError` for a card that is not of an earlier export, and would be lost."""
    if card.is_file() and "fwd2bot" not in (ModelCard.load(card, ignore_metadata_errors=True).data.tags or []):
        raise ValueError(
            f"{card} was not written by an export (its metadata have no tag fwd2bot), and would be replaced. Move it "
            "away, or choose another folder"
        )


def _found(given: Path | None, places: Sequence[Path], what: str, source: str) -> Path | None:
    """A file that was given, or the first of its usual places that is there."""
    if given is None:
        return next((place for place in places if place.is_file()), None)
    if not given.is_file():
        raise FileNotFoundError(f"There is no {what} {given}. {source} has one; give none to export without.")
    return given


def _read_run(recipe: Path | None, checkpoint: Path) -> dict[str, Any] | None:
    """The recipe of the run, with the command that began it and its steps, where these were noted down."""
    if recipe is None:
        return None
    run = json.loads(recipe.read_text(encoding="utf-8"))
    if (checkpoint / STEPS).is_file():
        run |= json.loads((checkpoint / STEPS).read_text(encoding="utf-8"))
    elif (checkpoint / "trainer_state.json").is_file():
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        run |= {"steps": step, "weights_of_step": step}
    command = recipe.parent / COMMAND
    return run | ({"command": command.read_text(encoding="utf-8").strip()} if command.is_file() else {})


def _backbone_licence(path: str | None, base: str | None) -> str | None:
    """The licence in the backbone's own card, if that lies on this machine."""
    places = [Path(path) / CARD] if path and Path(path).is_dir() else []
    cached = try_to_load_from_cache(base, CARD) if base else None
    places += [Path(cached)] if isinstance(cached, str) else []
    for place in places:
        if place.is_file():
            return ModelCard.load(place, ignore_metadata_errors=True).data.get("license")
    return None


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
