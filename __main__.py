"""`python -m kd`, and what the `kd` script calls."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `kd` with the arguments of the process; the exit code."""
    try:
        # Here, so that Ctrl-C while it is imported is no traceback.
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
