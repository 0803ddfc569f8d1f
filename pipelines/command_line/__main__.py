"""`python -m fwd2bot_cli`: the same as the command `fwd2bot`."""

from . import main

main()
