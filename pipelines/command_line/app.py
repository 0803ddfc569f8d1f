"""All commands together, and what every one of them does with an error or Ctrl-C."""

import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .model_commands import compress, demo, info, tour
from .printing import say
from .query_commands import ask, search
from .store_commands import delete, export, index, optimize, stats

INTERRUPTED = 130
STORE = 'pip install "fwd2bot[store]" (in a checkout: pip install -e ".[store]")'
ADVICE = {
    "gradio": 'pip install "fwd2bot[space]" (in a checkout: pip install -e ".[space]")',
    "lancedb": STORE,
    "pyarrow": STORE,
}


class Commands(TyperGroup):
    """Turns errors into one line on stderr and an exit code; `--debug` shows where they come from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise  # Typer's own business
        except KeyboardInterrupt as error:
            say("Interrupted." + (f" {ctx.meta['interrupted']}" if "interrupted" in ctx.meta else ""))
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if ctx.meta.get("debug"):
                traceback.print_exc()
            say(f"error: {_one_line(error)}")
            raise typer.Exit(1) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in ADVICE:
        return f"This needs {error.name}, which is not installed: {ADVICE[error.name]}"
    if isinstance(error, (OSError, ValueError, TypeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


app = typer.Typer(
    name="fwd2bot",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text, so that its examples stay as they are written
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (index, search, ask, stats, delete, optimize, export, compress, info, tour, demo):
    app.command()(command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fwd2bot {version('fwd2bot')}")
        raise typer.Exit


@app.callback()
def fwd2bot(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress pictures once into a few vectors each; search them and ask about them from these alone.

    \b
    fwd2bot index photos/ --store photos.store
    fwd2bot search photos.store "a dog on a green field"
    fwd2bot ask photos.store "What colour is the field?" --search "a dog"

    Exit codes: 0 all went well, 1 something was wrong with the data or the model, 2 the command was written wrongly,
    3 `index` went through, but some pictures could not be used, 130 interrupted by Ctrl-C.
    """
