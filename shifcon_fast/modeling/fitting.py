"""Whether a shift fits a model: what is refused, and what is said, before it is attached."""

from __future__ import annotations

import logging

from torch import nn

from shifcon_fast.modeling.architectures import Decoder
from shifcon_fast.modeling.fingerprint import fingerprint_differences, model_fingerprint, quantization_note
from shifcon_fast.notices import warn_once
from shifcon_fast.space.language_shift import LanguageShift, dose_warning
from shifcon_fast.space.language_space import LanguageSpace

logger = logging.getLogger(__name__)


def check_fits(shift: LanguageShift, model: nn.Module, decoder: Decoder, check_fingerprint: bool) -> None:
    """Refuse a shift of another model; say where it was estimated on other weights, and where it is
    too long or moves next to nothing.

    Raises:
        ValueError: another hidden size or number of boundaries, or, with ``check_fingerprint``, another model.
    """
    check_size(shift, decoder)
    made_with = shift.provenance.get("model")
    expected = made_with.get("fingerprint") if check_fingerprint and isinstance(made_with, dict) else None
    found = model_fingerprint(model) if expected else {}
    if expected and (differences := fingerprint_differences(expected, found)):
        origin = expected.get("name_or_path") or "another model"
        raise ValueError(
            f"space: it was estimated on {origin}, not on this model ({'; '.join(differences)}). "
            "Estimate a space on this model (shifcon profile), or pass check_fingerprint=False in Python if "
            "you know better."
        )
    if expected and (note := quantization_note(expected, found)):
        warn_once(note)
    if warning := dose_warning(shift):
        logger.warning("%s", warning)


def check_size(space: LanguageSpace | LanguageShift, decoder: Decoder) -> None:
    """Refuse vectors that a decoder's residual stream has no room for.

    Raises:
        ValueError: another hidden size or number of boundaries.
    """
    if space.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"space: got vectors of size {space.hidden_size}, wanted the model's hidden size "
            f"{decoder.hidden_size}; it was estimated on another model."
        )
    if space.num_boundaries != decoder.num_boundaries:
        raise ValueError(
            f"space: got {space.num_boundaries} boundaries, wanted {decoder.num_boundaries}, one per block of the "
            "model; it was estimated on another model."
        )
