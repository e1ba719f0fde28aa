"""A run's data sets on their way into ``Trainer``, with the names of their languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from shifcon_fast.data.languages import find_language, position_of
from shifcon_fast.modeling.vocabulary import embedding_rows, within_context
from shifcon_fast.notices import warn_once
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.batches.instruction_data import ExampleEncoder, InstructionCollator
from shifcon_fast.training.batches.language_column import PER_EXAMPLE, LanguageCollator
from shifcon_fast.training.batches.prepared_data import is_stream, languages_of, prepare


@dataclass
class TrainingData:
    """The data sets of a run.

    Attributes:
        languages: their names, in the order of the ids that batches hold.
        language_id: of a code; ValueError for an unknown one where the generation pass is shifted, else -1.
        collator: makes batches of examples.
        train, evaluation: ready for ``Trainer``; ``evaluation`` may be a dict of sets.
        prepare: makes one data set ready.
    """

    languages: tuple[str, ...]
    language_id: Callable[[str], int]
    collator: Callable[[list[Any]], Any] | None
    train: Any
    evaluation: Any
    prepare: Callable[[Any], Any] = lambda data: data

    @cached_property
    def examples(self) -> dict[str, int] | None:
        """Language → training examples; None for streams and where rows hold several languages or none is told."""
        names = getattr(self.train, "column_names", None) or ()
        ids = self.train[PER_EXAMPLE] if PER_EXAMPLE in names else getattr(self.train, "language_ids", None)
        if ids is None or is_stream(self.train):
            return None
        counts = Counter(ids)
        return {name: counts[index] for index, name in enumerate(self.languages) if counts[index]}

    def tell_what_is_in_one_only(self, shifted: Sequence[str], *, translations: bool) -> None:
        """Say once which of the shift's languages have no instructions, and which of the instructions' no shift.

        Args:
            shifted: the languages of the shift.
            translations: whether those are learnt from translations too.
        """
        if self.examples is None:
            return
        if without := [language for language in shifted if language not in self.examples]:
            learnt = "learnt from translations alone" if translations else "not trained on"
            warn_once(
                f"train_dataset: the language space has {', '.join(without)}, and no instruction is in it, or left "
                f"within max_length; {learnt}"
            )
        if beside := [language for language in self.examples if language not in shifted]:
            warn_once(
                f"train_dataset: instructions in {', '.join(beside)}, which the language space does not have, are "
                "trained on without translations"
            )

    def prepared(self, data: Any) -> Any:
        """One data set or a dict of them, ready; None and the name of an evaluation set as it is."""
        named = self.evaluation if isinstance(self.evaluation, Mapping) else {}
        if data is None or (isinstance(data, str) and data in named):
            return data
        return _each(self.prepare, data)


def read_training_data(
    model: Any,
    args: ShifConArguments,
    tokenizer: Any,
    known: Sequence[str],
    *,
    shifted: bool,
    train: Any,
    evaluation: Any,
    collator: Callable[[list[Any]], Any] | None,
) -> TrainingData:
    """Read and tokenise the data sets of a run.

    Args:
        model, args, tokenizer: of the run.
        known: the languages of the shift.
        shifted: whether the generation pass is; every language must then be known. Others only name losses.
        train, evaluation, collator: as the trainer was given them.

    Raises:
        DataError: see :func:`.prepare`.
    """
    languages, language_id = name_languages(known, args, train, evaluation, shifted=shifted)
    longest = within_context(args.max_length, model)
    encoder = ExampleEncoder(
        tokenizer,
        language_id,
        max_length=longest,
        limit="max_length" if longest == args.max_length else "the model's context",
        too_long=args.too_long,
        use_chat_template=args.use_chat_template,
        embedding_rows=embedding_rows(model),
    )

    def make(data: Any) -> Any:
        if is_stream(data):  # or accelerate would glue batches of different lengths together
            args.accelerator_config.dispatch_batches = False
        with args.main_process_first(desc="tokenising"):
            return prepare(
                data,
                encoder,
                language_column=args.language_column,
                wants_language=shifted,
                own_collator=collator is not None,
            )

    return TrainingData(
        languages=languages,
        language_id=language_id,
        # Where one process hands batches out, accelerate cuts them up, and what was counted does not fit any more.
        collator=InstructionCollator(
            tokenizer,
            embedding_rows(model),
            count_learnt=args.accelerator_config.dispatch_batches is not True,
        )
        if collator is None
        else LanguageCollator(collator),
        train=None if train is None else make(train),
        evaluation=None if evaluation is None else _each(make, evaluation),
        prepare=make,
    )


def name_languages(
    known: Sequence[str], args: ShifConArguments, train: Any, evaluation: Any, *, shifted: bool
) -> tuple[tuple[str, ...], Callable[[str], int]]:
    """The languages of a run, and the id of a code; arguments as for :func:`read_training_data`."""
    if shifted:
        return tuple(known), partial(position_of, known=tuple(known))
    languages = list(known)
    for data in (train, *(evaluation.values() if isinstance(evaluation, Mapping) else (evaluation,))):
        for code in languages_of(data, args.language_column):
            if find_language(code, languages) is None:
                languages.append(code)
    return tuple(languages), partial(_position_or_none, known=tuple(languages))


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor; a tokenizer as it is."""
    is_processor = type(processing_class).__name__.endswith("Processor")
    return getattr(processing_class, "tokenizer", processing_class) if is_processor else processing_class


def _each(make: Callable[[Any], Any], data: Any) -> Any:
    return {name: make(each) for name, each in data.items()} if isinstance(data, Mapping) else make(data)


def _position_or_none(language: str, known: Sequence[str]) -> int:
    """Of a language that only names a loss."""
    return -1 if find_language(language, known) is None else position_of(language, known)
