"""`python -m dsa_plugin.cli`: the `dsa` command where its script is not on the PATH."""

from dsa_plugin.cli import main

main()
