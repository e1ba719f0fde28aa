"""``shifcon generate`` and ``shifcon export``: what a run is good for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from shifcon_fast.data.prompts import encode_prompt
from shifcon_fast.evaluation.sentences import context_length
from shifcon_fast.export.targets import export_languages
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows
from shifcon_fast.notices import warn_once
from shifcon_fast.opening import is_run, open_model

logger = logging.getLogger(__name__)


def generate(
    model: str,
    prompts: Sequence[str],
    *,
    language: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    quantization: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Yield the answer to each prompt, shifted by ``language``; for ``auto``, by its own, which is logged.

    Raises:
        ValueError: no prompt, one that fills the model's context, or a model that is no run.
    """
    if not prompts:
        raise ValueError(
            "prompts: none given; wanted one or more, as arguments or a line each on standard input"
        )
    loaded, tokenizer = open_model(
        model, quantization=quantization, dtype=dtype, base=base, trust_remote_code=trust_remote_code
    )
    handle = getattr(loaded, "shifcon", None)
    if handle is None:
        raise ValueError(f"model: {model} has no language space to shift with; wanted the folder of a run")
    handle.language = language
    settings = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for prompt in prompts:
        prompt_ids = encode_prompt(tokenizer, prompt)
        check_token_ids(prompt_ids, tokenizer, embedding_rows(loaded), f"prompt {prompt[:40]!r}")
        room = max_new_tokens
        if (limit := context_length(loaded)) is not None:
            if len(prompt_ids) >= limit:
                raise ValueError(
                    f"prompt {prompt[:40]!r} has {len(prompt_ids)} tokens; the model's context holds {limit}, "
                    "answer included: shorten it"
                )
            room = min(max_new_tokens, limit - len(prompt_ids))
        if room < max_new_tokens:
            warn_once(f"Answers are no longer than what the model's context of {limit} tokens leaves them.")
        tokens = torch.tensor([prompt_ids], device=loaded.device)
        with torch.no_grad():
            answer = loaded.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=room,
                **settings,
            )
        if handle.detected:
            found, probability = handle.detected[0]
            logger.info("%r: %s (%.2f)", prompt[:40], found, probability)
        yield tokenizer.decode(answer[0, tokens.shape[1] :], skip_special_tokens=True)


def export(
    run: str,
    target: str,
    output: Path,
    *,
    languages: Sequence[str] | None = None,
    without_shift: bool = False,
    gguf_model: Path | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write a run's languages for a place that does not run this package, each checked by loading it."""
    if not is_run(run):
        raise ValueError(f"run: {run} is no run; wanted the folder that `shifcon train` wrote")
    loaded, tokenizer = open_model(
        run, quantization=quantization, dtype=dtype, base=base, trust_remote_code=trust_remote_code
    )
    written = export_languages(
        loaded,
        target,
        output,
        tokenizer=tokenizer,
        languages=languages,
        without_shift=without_shift,
        gguf_model=gguf_model,
    )
    return "\n".join(f"{path}: {found or 'not checked'}" for path, found in written.items())
