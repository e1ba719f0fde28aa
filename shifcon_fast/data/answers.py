"""Gold answers as data gives them: a number, a text, or a list of accepted ones."""

from __future__ import annotations

import math
from typing import Any

from shifcon_fast.data.errors import DataError

Answer = int | float | str | tuple[int | float | str, ...]


def check_answer(value: Any, where: str) -> Answer:
    """Return a gold answer if it is one; a list of accepted answers as a tuple.

    Raises:
        DataError: null, true or false, an object, an empty text or list, NaN or Infinity (which Python and
            pandas write, though JSON has neither).
    """
    what = f"{where}: 'answer' is {value!r}"
    if isinstance(value, (list, tuple)):
        if not value or any(isinstance(one, (list, tuple)) for one in value):
            raise DataError(f"{what}; wanted a list of accepted answers, each a number or a string")
        return tuple(one for each in value if not isinstance(one := check_answer(each, where), tuple))
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(f"{what}; wanted a number or a string")
    if isinstance(value, float) and not math.isfinite(value):
        named = (
            "NaN (not a number), which pandas writes for a missing value" if math.isnan(value) else "infinite"
        )
        raise DataError(f"{where}: 'answer' is {named}; wanted a finite number or a string")
    if isinstance(value, str) and not any(c.isprintable() and not c.isspace() for c in value):
        raise DataError(f"{what}, which is empty; wanted a number or a string")
    return value
