"""How a single command ends: `python -m specrepro.corpus`, `.eagle3`, `.eagle3_lab` and so on.

What could be foreseen (a wrong setting, a checkpoint that does not fit, a full disk) is one line;
`python -X dev -m specrepro...` shows where it came from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from specrepro.assets import AssetError

FORESEEN = (ValueError, OSError, AssetError)
STOPPED = "interrupted; the same command goes on, with --resume if it has that option"
INTERRUPTED = 130  # as shells have it: 128 and the signal's number


def run(main: Callable[..., object], *arguments: object) -> None:
    """Call `main`, which reads the command line itself, and leave with its exit status.

    0, or 1 where it failed foreseeably, or 130 where it was interrupted; a `main` that returns a
    number has chosen for itself.
    """
    sys.exit(_status(main, *arguments))


def _status(main: Callable[..., object], *arguments: object) -> int:
    foreseen = () if sys.flags.dev_mode else FORESEEN
    try:
        chosen = main(*arguments)
    except KeyboardInterrupt:
        return _say(STOPPED, INTERRUPTED)
    except foreseen as error:
        return _say(str(error), 1)
    return chosen if isinstance(chosen, int) else 0


def _say(what: str, status: int) -> int:
    print(f"specrepro.{Path(sys.argv[0]).stem}: {what}", file=sys.stderr)
    return status
