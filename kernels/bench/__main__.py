"""`python -m namr_dist.kernels.bench`: the same as `namr bench kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .options import add_arguments, execute
from .table import RefusedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, or 2 for bad input, told in one line on
    stderr."""
    parser = argparse.ArgumentParser(prog="python -m namr_dist.kernels.bench")
    add_arguments(parser)
    try:
        execute(parser.parse_args(arguments))
    except RefusedError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(
            f"bench: error: {error.strerror}: {error.filename or 'no file named'}; give another path",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
