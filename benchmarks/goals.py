"""The goals on a GPU (docs/performance.md): which benchmarks show whether one is held, and in what order they run.

    python benchmarks/goals.py DIR     what the records say of each goal that ``scripts/gpu_check.sh`` wrote to DIR

A benchmark is named by its file and pytest's id. Within a group ours comes first, then the peers: a run that is cut
off has told the most.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN = (2048, 3072, 4096, 5120, 8192)
HOST = (
    "add_shift_rms_norm",
    "masked_mean_pool",
    "info_nce",
    "contrastive_similarity",
    "subspace_project",
)
NORM_PEERS = ("Liger", "F.rms_norm", "torch.compile", "eager", "quack")
LOSS_PEERS = ("torch.compile", "eager", "loop per sentence")
PROJECTION_PEERS = ("torch.compile", "torch.compile, padded", "eager", "eager, float32 inside")
Rows = dict[str, dict[str, Any]]  # by benchmark: what was recorded of it


def forward(hidden: int, peer: str, rows: int = 8192) -> str:
    return f"test_norm.py::test_forward[{rows}-{hidden}-{peer}]"


def backward(hidden: int, weight: str, peer: str) -> str:
    return f"test_norm.py::test_backward[{hidden}-{weight}-{peer}]"


def loss(size: str, peer: str) -> str:
    return f"test_contrastive.py::test_loss_forward_and_backward[{size}-{peer}]"


def projection(rank: int, peer: str) -> str:
    return f"test_projection.py::test_forward[{rank}-{peer}]"


def host(operator: str, gradients: bool) -> str:
    return f"test_host.py::test_host_time[{operator}-{gradients}]"


# Both sizes of a goal, the one that training uses first.
LOSSES = ("10x64x4096-float32", "10x64x4096-bfloat16")
LARGE = "1x65536x1024-bfloat16"
RANKS = (16, 64)


@dataclass(frozen=True)
class Goal:
    """A figure to reach: ``figure(rows, step)`` of the benchmarks ``ours`` and ``peers``; None is unknown."""

    text: str
    group: str
    wanted: float
    at_least: bool
    unit: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    figure: Callable[[Rows, dict[str, Any]], float | None]

    def held(self, figure: float) -> bool:
        return figure >= self.wanted if self.at_least else figure <= self.wanted


def _all(rows: Rows, names: Iterable[str], key: str) -> list[float] | None:
    """The figures of all of them, or None: the worst of some would not be the worst."""
    found = [rows.get(name, {}).get(key) for name in names]
    return None if None in found else [float(value) for value in found if value is not None]


def _share(text: str, names: Sequence[str], peers: Sequence[str], wanted: float) -> Goal:
    def figure(rows: Rows, step: dict[str, Any]) -> float | None:
        found = _all(rows, names, "percent_of_copy")
        return None if found is None else min(found)

    group = "norm" if "test_norm" in names[0] else "projection"
    return Goal(text, group, wanted, True, "% of copy", tuple(names), tuple(peers), figure)


def _faster(text: str, group: str, ours: str, peers: Sequence[str], wanted: float) -> Goal:
    """How many times as long as ours the fastest of the peers takes that ran."""

    def figure(rows: Rows, step: dict[str, Any]) -> float | None:
        mine = rows.get(ours, {}).get("ms")
        theirs = [rows[name]["ms"] for name in peers if name in rows]
        return min(theirs) / mine if mine and theirs else None

    return Goal(text, group, wanted, True, "x", (ours,), tuple(peers), figure)


def _shift_costs(rows: Rows, step: dict[str, Any]) -> float | None:
    names = [forward(hidden, "ours") for hidden in HIDDEN]
    with_shift = _all(rows, names, "ms")
    without = _all(rows, [forward(hidden, "ours, no shift") for hidden in HIDDEN], "ms")
    if with_shift is None or without is None:
        return None
    return max(100 * (one / other - 1) for one, other in zip(with_shift, without, strict=True))


def _memory(rows: Rows, step: dict[str, Any]) -> float | None:
    found = _all(rows, [loss(LARGE, "ours"), loss(LARGE, "eager")], "peak_mib")
    return 100 * found[0] / found[1] if found else None


def _host_time(rows: Rows, step: dict[str, Any]) -> float | None:
    found = _all(rows, [host(name, gradients) for name in HOST for gradients in (False, True)], "ms")
    return max(found) * 1e3 if found else None


def _authors(rows: Rows, step: dict[str, Any]) -> float | None:
    authors, ours = (step.get("variants", {}).get(name, {}).get("ms") for name in ("authors' recipe", "ours"))
    return authors / ours if authors and ours else None


def _bound(rows: Rows, step: dict[str, Any]) -> float | None:
    """Ours against the time that its matrix products would take at the rate at which plain QLoRA's ran."""
    variants = step.get("variants", {})
    plain, ours = (variants.get(name, {}) for name in ("plain QLoRA", "ours"))
    if not plain.get("ms") or not ours.get("ms"):
        return None
    return float(ours["ms"] / (plain["ms"] * ours["flops"] / plain["flops"]))


def _norm_goals() -> Iterable[Goal]:
    every = [forward(hidden, "ours") for hidden in HIDDEN]
    peers = [forward(hidden, peer) for hidden in HIDDEN for peer in NORM_PEERS]
    yield _share("norm forward, d 2,048 ... 8,192", every, peers, 90)
    for weight, wanted in (("frozen", 85), ("trainable", 70)):
        names = [backward(hidden, weight, "ours") for hidden in HIDDEN]
        others = [backward(hidden, weight, peer) for hidden in HIDDEN for peer in NORM_PEERS]
        yield _share(f"norm backward, weight {weight}", names, others, wanted)
    without = tuple(forward(hidden, "ours, no shift") for hidden in HIDDEN)
    yield Goal("the shift's cost", "norm", 2, False, "% of the forward", (*every, *without), (), _shift_costs)


def _loss_goals() -> Iterable[Goal]:
    for size in LOSSES:
        compiled, loop = loss(size, "torch.compile"), loss(size, "loop per sentence")
        yield _faster(f"info_nce {size}, torch.compile", "info_nce", loss(size, "ours"), [compiled], 1.5)
        yield _faster(f"info_nce {size}, the authors' loop", "info_nce", loss(size, "ours"), [loop], 10)
    ours, eager = loss(LARGE, "ours"), loss(LARGE, "eager")
    yield _faster(f"info_nce {LARGE}, eager", "info_nce_65536", ours, [eager], 1.5)
    yield Goal(
        f"info_nce {LARGE}, memory", "info_nce_65536", 3, False, "% of eager's", (ours,), (eager,), _memory
    )


def _projection_goals() -> Iterable[Goal]:
    for rank in RANKS:
        ours = projection(rank, "ours")
        peers = [projection(rank, peer) for peer in PROJECTION_PEERS]
        yield _share(f"subspace_project, k = {rank}", [ours], peers, 70)
        yield _faster(f"subspace_project, k = {rank}, best peer", "projection", ours, peers, 3)


def _never_slower(group: str, pairs: Sequence[tuple[str, Sequence[str]]]) -> Goal:
    """The case in which the best peer comes nearest: how many times as long as ours it takes."""

    def figure(rows: Rows, step: dict[str, Any]) -> float | None:
        ratios = [
            min(rows[peer]["ms"] for peer in peers if peer in rows) / rows[ours]["ms"]
            for ours, peers in pairs
            if ours in rows and any(peer in rows for peer in peers)
        ]
        return min(ratios) if len(ratios) == len(pairs) else None

    ours, peers = tuple(one for one, _ in pairs), tuple(peer for _, peers in pairs for peer in peers)
    return Goal(f"{group}: the best peer, every size", group, 1, True, "x", ours, peers, figure)


def _peers() -> Iterable[Goal]:
    norm = [(forward(d, "ours"), [forward(d, peer) for peer in NORM_PEERS]) for d in HIDDEN]
    norm += [
        (backward(d, weight, "ours"), [backward(d, weight, peer) for peer in NORM_PEERS])
        for weight in ("frozen", "trainable")
        for d in HIDDEN
    ]
    yield _never_slower("norm", norm)
    losses = [(loss(size, "ours"), [loss(size, peer) for peer in LOSS_PEERS]) for size in LOSSES]
    yield _never_slower("info_nce", losses)


def goals() -> list[Goal]:
    hosts = tuple(host(name, gradients) for name in HOST for gradients in (False, True))
    return [
        *_norm_goals(),
        *_loss_goals(),
        *_projection_goals(),
        *_peers(),
        Goal("host time of a call", "host", 15, False, "us", hosts, (), _host_time),
        Goal("a step: the authors' recipe, ours", "step", 2, True, "x", (), (), _authors),
        Goal("a step: ours, plain QLoRA's FLOP bound", "step", 1.1, False, "x", (), (), _bound),
    ]


def _in_order(wanted: Iterable[Goal]) -> list[str]:
    """Ours of every goal, then the peers, the best known at the middle width first."""
    chosen = list(wanted)
    peers = [name for goal in chosen for name in goal.peers]
    peers.sort(key=lambda name: "-4096-" not in name and "[4096-" not in name)
    return list(dict.fromkeys([*(name for goal in chosen for name in goal.ours), *peers]))


GROUPS = {
    group: _in_order(goal for goal in goals() if goal.group == group)
    for group in ("norm", "info_nce", "projection", "host", "info_nce_65536")
}


def read(folder: Path) -> tuple[Rows, dict[str, Any]]:
    """What was recorded: the last good row of each benchmark, and step.json; empty where there is none."""
    rows: Rows = {}
    file = folder / "benchmarks.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        row = json.loads(line)
        if "ms" in row:
            rows[row["name"]] = row
    step = folder / "step.json"
    return rows, json.loads(step.read_text(encoding="utf-8")) if step.exists() else {}


def missed(folder: Path) -> list[str]:
    """The benchmarks of the goals that were missed, then of those not measured, ours with all their peers.

    No steps; those of the group "info_nce_65536" run in a call of their own.
    """
    rows, step = read(folder)
    short, unknown = [], []
    for goal in goals():
        figure = goal.figure(rows, step)
        if goal.ours and goal.group != "info_nce_65536":
            if figure is None:
                unknown.append(goal)
            elif not goal.held(figure):
                short.append(goal)
    return list(dict.fromkeys(_in_order(short) + _in_order(unknown)))


def table(folder: Path) -> str:
    rows, step = read(folder)
    lines = []
    for goal in goals():
        figure = goal.figure(rows, step)
        sign = "≥" if goal.at_least else "≤"
        said = "not measured" if figure is None else f"{figure:.2f} {goal.unit}"
        verdict = "" if figure is None else "held" if goal.held(figure) else "MISSED"
        lines.append(f"{goal.text:48s} {sign} {goal.wanted:<5g} {said:24s} {verdict}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(table(parser.parse_args().folder))
