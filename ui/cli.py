"""The `reattend` command: parse, run one command, turn what goes wrong into one sentence and an exit code.

Exit codes: 0 done, 1 the work itself failed, 2 bad input, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

import tyro

from .commands import Command

__all__ = ["main"]

DESCRIPTION = "Pictures from stock diffusers pipelines with other attention inside."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of this process) and return the exit code."""
    try:
        command = tyro.cli(
            Command,
            prog="reattend",
            description=DESCRIPTION,
            args=argv,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        command.run()
    except SystemExit as stop:  # --help, or options that cannot be read: tyro has said so
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("reattend: stopped", file=sys.stderr)
        return 130
    except (TypeError, ValueError) as error:
        return _explain(error, 2)
    except (MemoryError, OSError, RuntimeError) as error:
        return _explain(error, 1)
    return 0


def _explain(error: Exception, code: int) -> int:
    """Print an error that was raised on purpose as one sentence; anything else is a defect and keeps its traceback."""
    if not isinstance(error, OSError) and _raised_in(error.__traceback__) not in ("reattend", "diffusers"):
        raise error
    print(f"reattend: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _raised_in(traceback: TracebackType | None) -> str:
    """The top-level package whose code raised."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
