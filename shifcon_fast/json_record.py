"""Dataclasses that are one JSON file each: what an evaluation, a comparison or a sweep found."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from shifcon_fast.storage import read_json, write_json


class JsonRecord:
    """Base of a dataclass that says in its file what it is, and of which version.

    Attributes:
        KIND, FORMAT_VERSION: stand in the file, and must when it is read.
        FILE_NAME: what the file is called in its folder; None: whoever saves it names the file.
        WANTED: what the file should have been, for the error where it is none.
    """

    KIND: ClassVar[str]
    FORMAT_VERSION: ClassVar[int] = 1
    FILE_NAME: ClassVar[str | None] = None
    WANTED: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with all fields, and perhaps with a ``summary`` for readers, which is not read back."""
        summary = self._summary()
        return {
            "format_version": self.FORMAT_VERSION,
            "kind": self.KIND,
            **asdict(self),  # type: ignore[call-overload]
            **({} if summary is None else {"summary": summary}),
        }

    def _summary(self) -> Any:
        return None

    def save(self, place: str | Path) -> Path:
        """Write the file, atomically, into the folder ``place``, or to ``place`` if it has no name of its own.

        Returns:
            Its path.
        """
        path = Path(place) if self.FILE_NAME is None else Path(place) / self.FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())
        return path

    @classmethod
    def load(cls, place: str | Path) -> Self:
        """Read the file, or a folder's.

        Raises:
            ValueError: no such file, or not such a record that this release reads; the message names the file.
        """
        path = Path(place)
        if cls.FILE_NAME is not None and path.is_dir():
            path /= cls.FILE_NAME
        return read_json(
            path, cls.WANTED, cls, wanted={"kind": cls.KIND, "format_version": cls.FORMAT_VERSION}
        )
