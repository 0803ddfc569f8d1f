"""The command `fwd2bot`. A package of its own beside `fwd2bot`, which imports torch: help and errors come at once."""

from .app import app


def main() -> None:
    """What the command `fwd2bot` runs."""
    app(prog_name="fwd2bot")


__all__ = ["app", "main"]
