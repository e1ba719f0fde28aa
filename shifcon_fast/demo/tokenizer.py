"""A word-level tokenizer for the demo's world: one token per word, ``.`` and ``?`` apart."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from shifcon_fast.demo.words import LANGUAGES, NAMES, RELATIONS

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def vocabulary() -> list[str]:
    """Every word of the demo's languages, sorted; the same for every world."""
    words: set[str] = set(NAMES) | {".", "?"}
    for relation in RELATIONS:
        for language in LANGUAGES:
            for template in (*relation.statements[language], *relation.questions[language]):
                text = template.format(name="", value="")
                words.update(text.replace(".", " ").replace("?", " ").split())
        words.update(word for row in relation.values for word in row)
    return [*SPECIAL_TOKENS, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every demo model. It adds ``<s>`` and pads on the left unless told otherwise.

    Decoding gives the text back exactly: words are joined by spaces, ``.`` and ``?`` without one.
    """
    vocab = {word: number for number, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.?]"), "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
    )
