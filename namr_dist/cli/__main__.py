"""`python -m namr_dist.cli`: the `namr` command by the interpreter at hand."""

import sys

from namr_dist.cli.main import main

sys.exit(main())
