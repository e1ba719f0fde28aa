"""``shifcon profile`` and ``shifcon sweep``: what is found out about a model before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shifcon_fast.data.parallel import find_pivot, read_parallel
from shifcon_fast.evaluation.sweep import sweep_area
from shifcon_fast.evaluation.sweep_table import sweep_table
from shifcon_fast.extras import MissingExtraError
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.opening import is_run, open_model
from shifcon_fast.space import space_folder
from shifcon_fast.space.area import Area, recommend_area
from shifcon_fast.space.language_shift import dose_warning
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import FILE_NAME as SWEEP_FILE
from shifcon_fast.space.sweep_result import AreaSweep
from shifcon_fast.storage import replacing, write_file, write_json
from shifcon_fast.tables import space_table

AREA_FILE, DISTANCE_PLOT = "area.json", "distance.svg"


def profile(
    model: str,
    parallel: str,
    output: Path,
    *,
    pivot: str = "en",
    languages: Sequence[str] | None = None,
    quantization: str = "nf4",
    dtype: str | None = None,
    batch_size: int = 16,
    rank: int | None = None,
    variance: float | None = None,
    max_length: int | None = None,
    allow_missing: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Estimate and save a language space, its recommended area (``area.json``) and a plot of the distances."""
    sentences = read_parallel(parallel, languages=languages, allow_missing=allow_missing)
    pivot = find_pivot(pivot, sentences, parallel)
    loaded, tokenizer = open_model(
        model, quantization=quantization, dtype=dtype, trust_remote_code=trust_remote_code
    )
    space = estimate_space(
        loaded,
        tokenizer,
        sentences,
        pivot,
        batch_size,
        rank=rank,
        variance=variance,
        max_length=max_length,
    )
    left_over = _sweep_beside(space, output)
    area = recommend_area(space)
    plot, no_plot = _drawn(_distance_plot, space, area)
    with replacing(output, space_folder.CARD, (space_folder.TENSORS, AREA_FILE, DISTANCE_PLOT)) as staging:
        space.save(staging)
        write_json(staging / AREA_FILE, asdict(area))
        if plot is not None:
            (staging / DISTANCE_PLOT).write_bytes(plot)
    warning = dose_warning(space.shift(*area.span)) if area.span else None
    lines = [
        space_table(space, area),
        "",
        area.reason,
        *([f"warning: {warning}"] if warning else []),
        *left_over,
        *no_plot,
    ]
    return "\n".join([*lines, "", f"written to {output}"])


def _distance_plot(space: LanguageSpace, area: Area) -> bytes:
    from shifcon_fast.evaluation.plots import distance_plot

    return distance_plot(
        range(space.num_boundaries),
        area.distances,
        area.floor,
        area=area.span,
        split_distances=area.split_distances,
    )


def _sweep_plot(sweep: AreaSweep, alpha: float, area: Area) -> bytes:
    from shifcon_fast.evaluation.sweep_plot import sweep_plot

    return sweep_plot(sweep, alpha=alpha, chosen=area.span)


def _drawn(draw: Callable[..., bytes], *of: Any) -> tuple[bytes | None, list[str]]:
    """A picture; or None, and a line that says why there is none: what was measured is worth more than it."""
    try:
        return draw(*of), []
    except MissingExtraError as error:
        return None, [f"the picture is left out: {error}"]


def _sweep_beside(space: LanguageSpace, folder: Path) -> list[str]:
    """Take over the sweep that lies in a space's folder if it is of these vectors; else what to say of it."""
    if not (folder / SWEEP_FILE).is_file():
        return []
    advice = "sweep again with --overwrite, or delete it"
    try:
        found = AreaSweep.load(folder)
    except ValueError as error:
        return [f"{error}: {advice}"]
    if not found.is_of(space.vectors_sha256):
        return [f"{folder / SWEEP_FILE} is of an earlier language space: {advice}"]
    space.sweep = found
    return []


def sweep(
    model: str,
    space: Path,
    parallel: str,
    *,
    questions: str | None = None,
    output: Path | None = None,
    quantization: str = "nf4",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> str:
    """Try layer areas on a model; write ``sweep.json``, its heat maps and the area that it decides on.

    Args:
        output: None writes beside the language space, where ``train`` finds the sweep.
        options: of :func:`~shifcon_fast.evaluation.sweep.sweep_area`.
    """
    output = output if output is not None else space
    loaded_space = LanguageSpace.load(space)
    if is_run(model):
        raise ValueError(
            f"model: {model} is a run, trained for its own area; wanted the model before training"
        )
    loaded, tokenizer = open_model(
        model, quantization=quantization, dtype=dtype, trust_remote_code=trust_remote_code
    )
    found = sweep_area(loaded, tokenizer, loaded_space, parallel, questions, output=output, **options)
    areas = [recommend_area(loaded_space, alpha=alpha) for alpha in found.alphas]
    write_json(output / AREA_FILE, asdict(areas[0]))
    left_out: list[str] = []
    for alpha, area in zip(found.alphas, areas, strict=True):
        name = "sweep.svg" if len(areas) == 1 else f"sweep-alpha-{alpha:g}.svg"
        plot, left_out = _drawn(_sweep_plot, found, alpha, area)
        if plot is not None:
            write_file(output / name, plot)
    return "\n".join(
        [
            sweep_table(found),
            "",
            *(area.reason for area in areas),
            *left_out,
            "",
            f"{len(found.areas)} areas, measured in {found.seconds / 60:.1f} minutes; written to {output}",
            f"next: shifcon train --model {model} --space {output} ...{'' if areas[0].span else ' --no-shift'}"
            if output == space
            else f"`train --space {space}` does not see it: copy {SWEEP_FILE} there",
        ]
    )
