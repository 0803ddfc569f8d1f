"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def is_url(text: str) -> bool:
    """As that of the pipelines, whose import takes seconds."""
    return text.startswith(("http://", "https://"))


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta["debug"] = value
    return value


Store = Annotated[str, typer.Argument(metavar="STORE", help="A folder, or the URI of one on object storage.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show where in the code an error arose."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="PATH_OR_ID",
        help="Checkpoint: a folder or an id on the Hub. Default: the one that made the store; for what is new, the "
        "one inside the package.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that lies in the checkpoint instead of this package's. Only for one that you trust.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs, such as cpu or cuda:1. Default: an accelerator if any.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the model; auto is that of the checkpoint. Default: float32 on a CPU, else auto."),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "-k", "--num-summary-tokens", min=1, help="Length of each summary. Default: the largest of the model."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures that go through the model at once.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="How many pictures to find.")]
Where = Annotated[
    str | None, typer.Option(metavar="SQL", help="Only pictures of which this is true: \"year > 2020 AND lab = 'A'\".")
]
Rerank = Annotated[
    Literal["maxsim"] | None,
    typer.Option(help="Order the best candidates anew by late interaction over the summary tokens."),
]
Candidates = Annotated[int, typer.Option(min=1, help="How many pictures --rerank orders anew.")]
Show = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the pictures found into a contact sheet (.png) or a page (.html)."),
]
