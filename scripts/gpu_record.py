"""A pytest plugin for machines that are lent by the minute: every outcome is on disk when it is known.

``-p gpu_record --record FILE``: append each test's outcome to FILE (JSON lines: part, id, outcome, seconds,
message).
``--done FILE``: leave out the tests that FILE names (one a line), which ended before.

A test after which the device no longer answers (an illegal address, say) ends the process with exit status 77, as
everything after it would fail for nothing; under pytest-xdist the worker, which is then replaced.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LOST = 77
MOST_CHARACTERS = 600  # of a message


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_record")
    group.addoption("--record", metavar="FILE", help="append each test's outcome to FILE")
    group.addoption("--record-part", metavar="NAME", default="", help="what to record as the part")
    group.addoption("--done", metavar="FILE", help="leave out the tests whose ids stand in FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Recorder(config), "gpu_recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--done")
    if file is None or not Path(file).exists():
        return
    done = set(Path(file).read_text(encoding="utf-8").splitlines())
    left_out = [item for item in items if item.nodeid in done]
    items[:] = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=left_out)


class Recorder:
    """Writes the rows; of pytest-xdist's processes the controller, a worker only that of a lost device."""

    def __init__(self, config: pytest.Config) -> None:
        self.file = Path(config.getoption("--record"))
        self.part = str(config.getoption("--record-part"))
        self.worker = hasattr(config, "workerinput")

    def add(self, report: pytest.TestReport, **more: Any) -> None:
        row = {
            "part": self.part,
            "id": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "message": message(report),
            **more,
        }
        # One write of one line at the file's end: several processes may do it at a time.
        with self.file.open("ab", buffering=0) as stream:
            stream.write((json.dumps(row) + "\n").encode())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and not device_answers():
            self.add(report, device="lost")
            print(f"{item.nodeid}: the device no longer answers\n{report.longreprtext}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(LOST)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.worker and (report.when == "call" or report.outcome != "passed"):
            self.add(report)


def message(report: pytest.TestReport) -> str | None:
    """The last lines of a failure, or why a test was skipped."""
    if report.passed:
        return None
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longreprtext)[:MOST_CHARACTERS]


def device_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
