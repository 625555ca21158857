"""`python -m pivot_plugin.cli`: the `pivot` command, as launchers start it."""

from .app import main

main()
