"""`python -m fdserve`, and the command `fdserve`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Serve until a signal says otherwise; return the exit status: see `fdserve.launcher.main`."""
    # Until the launcher takes the signals over, Ctrl-C just ends the process: no traceback out of an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fdserve import launcher

    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
