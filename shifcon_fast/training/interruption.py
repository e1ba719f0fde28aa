"""Ctrl-C or SIGTERM during training: finish the step, save, then stop; all processes at the same step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from shifcon_fast.training.losses.loss_meter import OnItsWay
from shifcon_fast.training.run.checkpoints import list_checkpoints

logger = logging.getLogger(__name__)


class InterruptOnce:
    """A context in which a first SIGINT or SIGTERM only sets ``requested``; a second one raises KeyboardInterrupt.

    SIGTERM is what schedulers, and torchrun where it is stopped itself, send some time before they kill. A handler
    of SIGTERM that is there already stays. Outside of the main thread Python allows no handlers, and signals do
    what they did before.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptOnce:
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning(
            "Interrupted: finishing this step and saving a checkpoint. Ctrl-C again aborts at once."
        )


class InterruptibleTrainer:
    """Mixin of trainers: what any process is asked to stop by stops all of them, at the same step."""

    args: Any
    state: Any
    _any_process: Any
    _reduce: Any

    def _watch_for_interrupts(self) -> InterruptOnce:
        self._interrupt = InterruptOnce()
        self._asked: OnItsWay | None = None  # of all processes, at the end of the step before
        self._stopped = False
        return self._interrupt

    def _stops(self) -> bool:
        """At the end of a step: whether to stop now, which every process answers alike.

        Several look at what they were asked by the end of the step before, so that none waits for the answer.
        """
        if self.args.world_size == 1:
            self._stopped = self._interrupt.requested
        else:
            before, asked = self._asked, torch.tensor([float(self._interrupt.requested)])
            self._asked = OnItsWay(self._reduce(asked))
            self._stopped = before is not None and before.values() != [0.0]
        return self._stopped

    def _raise_if_stopped(self) -> None:
        """After training.

        Raises:
            KeyboardInterrupt: it was stopped.
        """
        if self._stopped:
            saved = list_checkpoints(self.args.output_dir)
            where = f"; saved as {saved[-1]}" if saved else ""
            raise KeyboardInterrupt(f"stopped after step {self.state.global_step}{where}")

    def _raise_if_asked_too_late(self) -> None:
        """After the run is saved, for what comes after training in the caller's program.

        Raises:
            KeyboardInterrupt: a process was asked to stop when there was no step left to stop after.
        """
        if self._any_process(self._interrupt.requested):
            raise KeyboardInterrupt(f"the run was finished by then; saved as {self.args.output_dir}")
