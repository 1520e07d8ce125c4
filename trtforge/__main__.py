"""`python -m trtforge` is the command line."""

from trtforge.converter.cli import run

run()
