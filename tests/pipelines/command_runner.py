"""How tests run the command `fwd2bot` in this process."""

import json

from fwd2bot_cli import app
from typer.testing import CliRunner


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)


def run_json(*arguments, exit_code=0):
    """What a command printed on stdout, which must be one JSON document."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    return json.loads(result.stdout)


def fails(*arguments, exit_code=1):
    """The one line on stderr of a command that fails."""
    result = run(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    if exit_code == 1:
        assert len(result.stderr.splitlines()) == 1, result.stderr
    return " ".join(result.stderr.split())
