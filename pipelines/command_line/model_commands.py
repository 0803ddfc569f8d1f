"""Commands that need no store: compress pictures into a file, look at a checkpoint, the tour, the demo."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .models import ModelOptions, load, read_config
from .options import BatchSize, Debug, Device, Dtype, Json, Model, Revision, Tokens, TrustRemoteCode, is_url
from .printing import print_fields, print_json, say, size


def compress(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Files or URLs.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE.safetensors", help="Where the summaries go.")],
    num_summary_tokens: Tokens = None,
    summary_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="Precision of the summaries in the file.")
    ] = "float16",
    batch_size: BatchSize = 16,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress pictures into a file of summaries.

    They are in the order in which the pictures are given; model.load_summary(file) reads them in Python. To search
    many pictures, make a store with `fwd2bot index`.

    \b
    fwd2bot compress a.jpg b.jpg --to pair.safetensors -k 8
    """
    if to.suffix != ".safetensors":
        raise typer.BadParameter(f"{str(to)!r} must end in .safetensors.", param_hint="--to")
    if not to.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(to.parent)!r} for {to.name!r}. Make it first.")
    missing = [one for one in images if not is_url(one) and not os.path.isfile(one)]
    if missing and os.path.isdir(missing[0]):
        raise FileNotFoundError(f"{missing[0]!r} is a folder. Give its files: {missing[0].rstrip('/')}/*")
    if missing:
        raise FileNotFoundError(f"{missing[0]!r} does not exist or is no file.")
    options = ModelOptions(model, revision, trust_remote_code, device, dtype)
    loaded, processor = load(options.or_embedded(), "compress")
    import torch
    from transformers import pipeline

    pipe = pipeline("fwd2bot-compress", model=loaded, processor=processor, device=loaded.device)
    summary = pipe(images, num_summary_tokens=num_summary_tokens, batch_size=batch_size)
    summary = summary.to(getattr(torch, summary_dtype))
    summary.save_file(to)
    if as_json:
        print_json(
            {
                "file": str(to),
                "pictures": images,
                "num_summary_tokens": summary.num_summary_tokens,
                "width": summary.tokens.shape[-1],
                "bytes": summary.nbytes,
                **summary.metadata,
            }
        )
    else:
        print(f"{len(summary):,} pictures, {summary.num_summary_tokens} vectors each, {size(summary.nbytes)} in {to}.")


def info(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Folder or id. Default: the one inside the package.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a checkpoint is, without loading its weights.

    \b
    fwd2bot info
    fwd2bot info ./my-fwd2bot --json | jq .num_summary_tokens
    """
    options = ModelOptions(checkpoint, revision, trust_remote_code, None, None).or_embedded()
    config = read_config(options)
    found: dict[str, Any] = {
        "checkpoint": options.name,
        "kind": _kind(config),
        "backbone": config.backbone_config.model_type,
        "backbone_name_or_path": config.backbone_name_or_path or None,
        "backbone_revision": config.backbone_revision,
        "num_summary_tokens": config.num_summary_tokens,
        "summary_lengths": list(config.summary_lengths),
        "width": config.get_text_config().hidden_size,
        "adapters": {
            stage: {name: one.get(name) for name in ("r", "lora_alpha")} for stage, one in config.adapters.items()
        },
        "image_prompt": config.image_prompt,
        "text_prompt": config.text_prompt,
        "fingerprint": config.fingerprint,
        **_weights(options.name),
    }
    if as_json:
        print_json(found)
        return
    adapters = [f"{stage} (r={one['r']}, alpha={one['lora_alpha']})" for stage, one in found["adapters"].items()]
    texts = {"adapters": ", ".join(adapters), "summary_lengths": ", ".join(map(str, found["summary_lengths"]))}
    if found["bytes"] is not None:
        texts |= {"bytes": size(found["bytes"]), "parameters": f"{found['parameters']:,}"}
    print_fields(found | texts)


def demo(
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="STORE", help="Show the pictures of this store, which is only read."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at. Default: 127.0.0.1, this machine.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first that is free from 7860 on.")
    ] = None,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Search, ask and look inside in a browser, on this machine.

    Needs `pip install "fwd2bot[space]"`. Nothing leaves this machine; docs/space.md says what visitors see.

    \b
    fwd2bot demo
    fwd2bot demo --store photos.store --port 8000
    fwd2bot demo --model ./my-fwd2bot
    """
    from fwd2bot.space_app.options import SpaceOptions
    from fwd2bot.space_app.serving import serve

    serve(SpaceOptions(model, revision, trust_remote_code, store, device, dtype), host, port)


def tour(
    output: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("demo/hits.png"),
    model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Another checkpoint.")] = None,
    device: Annotated[str, typer.Option(help="Where the models run, such as cuda.")] = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress, search and ask on the gallery, in the terminal.

    A second process searches and answers from the summaries alone.

    \b
    fwd2bot tour
    fwd2bot tour --output hits.png --json
    """
    from fwd2bot.pipelines.demo import DemoError, run
    from fwd2bot.pipelines.embedded import default_checkpoint

    try:
        results = run(model or default_checkpoint(), output, device, say=say if as_json else print)
    except DemoError as error:
        raise ValueError(str(error)) from error
    if as_json:
        print_json({"picture": str(output), "results": results})


def _kind(config: Any) -> str:
    if config.merged_stage is not None:
        return f"{config.merged_stage} stage merged into the weights"
    return "adapters alone" if config.adapter_only else "full"


def _weights(name: str) -> dict[str, int | None]:
    """Bytes and numbers in the weights of a folder, from the headers of its files."""
    from safetensors import safe_open

    if not os.path.isdir(name):
        return {"bytes": None, "parameters": None}
    files = list(Path(name).rglob("*.safetensors"))
    parameters = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                shape, count = tensors.get_slice(key).get_shape(), 1
                for length in shape:
                    count *= length
                parameters += count
    return {"bytes": sum(file.stat().st_size for file in files), "parameters": parameters}
