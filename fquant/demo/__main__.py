"""`python -m fquant.demo`: the same as `fquant demo`."""

import sys

from fquant.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
