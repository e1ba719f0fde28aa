"""The controls of an attached model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor, nn

from shifcon_fast.modeling.adapters import adapted_module
from shifcon_fast.modeling.architectures import Decoder, locate_decoder
from shifcon_fast.modeling.attachment import Attachment, unshifted
from shifcon_fast.modeling.block_shift import SHIFT_TABLE, shift_table
from shifcon_fast.modeling.fitting import check_fits
from shifcon_fast.modeling.installation import put_tables, swapped_modules, uninstall
from shifcon_fast.modeling.learned_alpha import as_learnt, learnt_alphas, start_learning, stop_learning
from shifcon_fast.modeling.norms import NORM_COUNTS, NormCounts
from shifcon_fast.modeling.spoken import Spoken, spoken
from shifcon_fast.modeling.swap import HANDLES, original_class
from shifcon_fast.space.language_shift import LanguageShift, Recipe

_AREA = ("forward", "backward", "recipe", "num_boundaries", "hidden_size")
_KEPT = ("languages", "pivot", *_AREA, "intervention", "targets")  # by set_shift


class ShiftHandle:
    """An attached model's controls: what :func:`.attach` returns and what the model has as ``shifcon``.

    As a context manager it detaches at the end.

    Attributes:
        model: the Hugging Face model; the one inside, where PEFT or another wrapper was attached.
    """

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        self.model = model
        self._attachment = attachment

    @property
    def shift(self) -> LanguageShift:
        """The shift in use: the active adapter's; the first one where the active adapter has none.

        With α as it is now, where it is learnt: that waits for the device.
        """
        return as_learnt(self._as_attached, self.learnt_alphas)

    @property
    def _as_attached(self) -> LanguageShift:
        found = self._attachment.in_use()
        return found.shift if found is not None else next(iter(self._attachment.shifts.values()))

    @property
    def shifts(self) -> Mapping[str | None, LanguageShift]:
        """adapter → its shift; None → one that is used whatever the adapter."""
        learnt = self.learnt_alphas
        return MappingProxyType(
            {adapter: as_learnt(each, learnt) for adapter, each in self._attachment.shifts.items()}
        )

    @property
    def forward(self) -> int:
        """Boundary of the shift toward the pivot."""
        return self._as_attached.forward

    @property
    def backward(self) -> int:
        """Boundary of the shift back."""
        return self._as_attached.backward

    @property
    def alpha(self) -> float:
        """Length of the shift, in language vector differences; of languages with a factor of their own, see
        :meth:`.LanguageShift.alpha_of`."""
        return self._as_attached.alpha

    @property
    def recipe(self) -> Recipe:
        """``"stable"`` or ``"official"``."""
        return self._as_attached.recipe

    @property
    def moves_pivot(self) -> bool:
        """Whether rows of the pivot are moved too, as some interventions do."""
        return self._as_attached.moves_pivot

    @property
    def learnt_alphas(self) -> nn.Parameter | None:
        """(K,) float32, the factor of α of each language while it is learnt; else None."""
        return learnt_alphas(self._decoder, self._attachment) if self._is_attached else None

    def learn_alpha(self) -> nn.Parameter:
        """Make α of each language a parameter of the model: (K,) float32 factors of :attr:`alpha`, 1 at first.

        Give it to the optimizer with a learning rate of its own, larger than the adapters', without weight decay;
        ``ShifConTrainer`` does with ``learn_alpha=True``. Gradients are exact, in mixed batches too. :attr:`shift`
        has the factors, and is saved, loaded and exported with them.

        Raises:
            ValueError: shifts of several adapters, or an alpha of 0.
        """
        self._require_attached()
        return start_learning(self._decoder, self._attachment)

    def freeze_alpha(self) -> None:
        """End :meth:`learn_alpha`: the model shifts as it has learnt to, and has no such parameter any more."""
        self._require_attached()
        stop_learning(self._decoder, self._attachment)

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return locate_decoder(self.model)

    @property
    def _is_attached(self) -> bool:
        return self.model.__dict__.get(HANDLES) is self._attachment

    @property
    def language(self) -> str | Sequence[str] | None:
        """The language of rows for which nothing else says one, in calls of every thread; None for none.

        Set it to a code, to one code per row, or to None. So whatever calls the model (``pipeline``, a server, an
        evaluation harness) needs no further argument. ``"auto"`` has each row find its own: from the content tokens
        of its prompt, at boundary f of the same pass, among the languages of the space; see :attr:`threshold` and
        :attr:`detected`.

        Raises:
            ValueError: when it is set to a code that no shift knows, the known ones are listed; to ``"auto"`` where
                no shift has a router (of spaces without subspaces, and of the official recipe).
        """
        spoken = self._attachment.spoken
        return None if spoken is None else spoken.languages

    @language.setter
    def language(self, languages: str | Sequence[str] | None) -> None:
        self._attachment.spoken = None if languages is None else self._spoken(languages)

    @property
    def threshold(self) -> float:
        """How likely the language that a row finds itself must be; rows below are left alone. 0.9 unless set."""
        return self._attachment.threshold

    @threshold.setter
    def threshold(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"threshold: got {probability}; wanted a probability, 0 … 1")
        self._attachment.threshold = float(probability)

    @property
    def detected(self) -> list[tuple[str, float]]:
        """What the rows of this thread's last prompt found: the likeliest language, and its probability.

        Empty where none looked; 0.0 for a prompt without a content token.
        """
        found = self._attachment.call.detected
        if found is None:
            return []
        languages = self.shift.languages
        return [(languages[index], p) for index, p in zip(found[0].tolist(), found[1].tolist(), strict=True)]

    @contextmanager
    def use(self, languages: str | Sequence[str]) -> Iterator[None]:
        """Rows without ids are in this language inside, or one language a row; for the calls of this thread.

        A thread that is started inside (to stream what ``generate`` says) is not: there, say it again.

        Raises:
            ValueError: a code that no shift knows; the known ones are listed.
        """
        with self._attachment.use(self._spoken(languages)):
            yield

    def _spoken(self, languages: str | Sequence[str]) -> Spoken:
        return spoken(languages, list(self.shifts.values()))

    def language_ids(
        self, languages: str | Sequence[str], device: torch.device | str | None = None
    ) -> Tensor:
        """Ids for the ``language_ids`` argument: (B,) int64, one per row of a batch.

        Args:
            languages: one code per row, or a single code for a batch of one row.
            device: where to put them; the CPU by default, the model moves them.

        Raises:
            ValueError: a code that the shift in use does not know; the known ones are listed.
        """
        codes = [languages] if isinstance(languages, str) else list(languages)
        ids = [self._as_attached.language_id(code) for code in codes]
        return torch.tensor(ids, dtype=torch.long, device=device)

    def shift_table(self, block: int) -> Tensor | None:
        """(K, d) float32, what the shift in use adds at the input of a block; None where it adds nothing."""
        _, first, shift = self._attachment.in_use() or (0, 0, self.shift)
        table = shift_table(self._decoder.blocks[block])
        if table is None or block not in shift.blocks:
            return None
        return table[first : first + len(shift.languages)].detach()

    def set_shift(self, shift: LanguageShift) -> None:
        """Use other vectors or another alpha in place of those of the shift in use, from the next forward on.

        Not between a forward and its backward: under gradient checkpointing, recomputation would use the new ones.
        Factors that are learnt stay as they are, whatever ``shift.alphas``.

        Raises:
            ValueError: another area, recipe, pivot, hidden size, other languages (or another order of them).
        """
        before = self._as_attached
        for name in _KEPT:
            if getattr(shift, name) != getattr(before, name):
                raise ValueError(
                    f"shift: got {name} {getattr(shift, name)}, wanted {getattr(before, name)}; detach and attach "
                    "to change it."
                )
        self._require_attached()
        shifts = self._attachment.shifts
        adapter = next(adapter for adapter, each in shifts.items() if each is before)
        shifts[adapter] = shift if self.learnt_alphas is None else replace(shift, alphas=None)
        put_tables(self._decoder, self._attachment)

    def add_shift(self, shift: LanguageShift, adapter: str, *, check_fingerprint: bool = True) -> None:
        """Attach the shift of a further PEFT adapter; ``set_adapter`` then chooses between adapters with theirs.

        Raises:
            ValueError: no such adapter, one that has a shift, or a shift of another model; a shift that is used
                whatever the adapter.
        """
        self._require_attached()
        if self.learnt_alphas is not None:
            raise ValueError(
                "shift: alpha is learnt, of the only shift of a model; call freeze_alpha() first."
            )
        if None in self.shifts or adapter in self.shifts:
            whose = "one whatever the adapter" if None in self.shifts else f"that of {adapter!r}"
            raise ValueError(f"adapter: the model is attached with {whose} already; detach it first.")
        check_fits(shift, self.model, self._decoder, check_fingerprint)
        if shift.is_map or self.shift.is_map:
            raise ValueError(
                f"shift: got intervention {shift.intervention!r} beside {self.shift.intervention!r}; a map "
                "must be the only shift of a model: wanted interventions that add vectors, or a model for each"
            )
        adapted = adapted_module(self._decoder.module, adapter)
        self._attachment.shifts[adapter] = shift
        self._attachment.adapted = adapted
        if self.language is not None:
            self.language = self.language  # in the new shift's ids too
        put_tables(self._decoder, self._attachment)

    def _require_attached(self) -> None:
        if not self._is_attached:
            raise ValueError("handle: it was detached; attach again.")

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No row is shifted inside, whatever says a language; the norms still go through the operators.

        Holds for the calls of this thread, none of which is warned of.
        """
        with unshifted(self.model):
            yield

    @property
    def engagements(self) -> dict[int, dict[str, int]]:
        """block → what → how often; compiled code is not counted.

        What is a norm site, for runs through ``ops.add_shift_rms_norm``, or, of blocks with a table, ``"shift"``,
        for runs in which it was added.
        """
        architecture, blocks = self._decoder.architecture, self._decoder.blocks
        found: dict[int, dict[str, int]] = {}
        for index, (block, counts) in enumerate(zip(blocks, self._norm_counts(), strict=True)):
            sites = architecture.norm_sites(block)
            what = (*sites, "shift") if SHIFT_TABLE in block._buffers else sites
            found[index] = {each: counts.engaged[each] for each in what}
        return found

    @property
    def bypassed(self) -> dict[int, dict[str, str]]:
        """block → norm site → why the norm module was called instead of the operator. Empty when all engage."""
        return {
            index: dict(counts.bypassed)
            for index, counts in enumerate(self._norm_counts())
            if counts.bypassed
        }

    def reset_engagements(self) -> None:
        """Start counting from zero."""
        for counts in self._norm_counts():
            counts.engaged.clear()
            counts.bypassed.clear()

    def detach(self) -> None:
        """Put the model back exactly as it was before :func:`.attach`. Once detached, does nothing.

        Raises:
            ValueError: something has changed a swapped module's class since (FSDP2 does); nothing is undone.
        """
        if not self._is_attached:
            return
        for module in swapped_modules(self._decoder, self.model):
            if original_class(module) is None:
                raise ValueError(
                    f"model: a {type(module).__name__} was given another class since it was attached, by "
                    "FSDP2's fully_shard for instance; it can only be detached after that is undone."
                )
        uninstall(self._decoder, self.model)

    def __enter__(self) -> ShiftHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"ShiftHandle({', '.join(f'{adapter}: {shift}' for adapter, shift in self.shifts.items())})"

    def _norm_counts(self) -> list[NormCounts]:
        blocks = enumerate(self._decoder.blocks)
        return [block.__dict__.get(NORM_COUNTS) or NormCounts(index) for index, block in blocks]
