"""What is said once in the life of a process, however often it comes up."""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning the first time it comes up."""
    logger.warning("%s", message)
