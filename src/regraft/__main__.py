"""`python -m regraft`: the command line."""

from regraft.cli import main

main()
