"""What the command makes of the package's messages and errors: a line each, and an exit code."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any, NoReturn

from shifcon_fast.extras import MissingExtraError, needed_for

with needed_for("the shifcon command"):
    import typer
    from typer.core import TyperGroup


class GuardedGroup(TyperGroup):
    """Turns the errors a user can mend into one clear line and an exit code.

    Exit codes: 2 for bad input, 1 for what went wrong in the run (a full disk, a NaN loss), 130 for Ctrl-C
    and for SIGTERM during training.
    ``SHIFCON_DEBUG=1`` lets the traceback through instead.
    """

    def invoke(self, ctx: Any) -> Any:
        _show_messages()
        if os.environ.get("SHIFCON_DEBUG"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is saved", 130)
        except (ValueError, TypeError) as error:
            _fail(str(error), 2)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                where = error.filename or "the output folder"
                _fail(f"no space left on the disk of {where}; what was saved before is untouched", 1)
            _fail(str(error), 1)
        except (ArithmeticError, MissingExtraError) as error:
            _fail(str(error), 1)


class _Console(logging.Handler):
    """Prints what the package logs: what was guessed, left out or not engaged."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        typer.secho(self.format(record), err=True, fg=typer.colors.YELLOW if warning else None)


def _show_messages() -> None:
    logger = logging.getLogger("shifcon_fast")
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())
    logger.setLevel(logging.INFO)


def _fail(message: str, code: int) -> NoReturn:
    typer.secho(f"error: {message}", err=True, fg=typer.colors.RED)
    raise SystemExit(code)
