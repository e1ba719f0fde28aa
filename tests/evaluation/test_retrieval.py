"""Retrieval and MEXA against loops in float64 over Hugging Face's own hidden states."""

import numpy as np
import pytest
import torch

from shifcon_fast.evaluation.retrieval import (
    duplicates,
    measure_retrieval,
    retrieval_scores,
    sentence_representations,
    top1_hits,
)


def naive_scores(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Top-1 both ways and MEXA of (N, d) representations, by comparing pairs one at a time."""
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    n = len(a)
    rows = [all(a[i] @ b[i] > a[i] @ b[j] for j in range(n) if j != i) for i in range(n)]
    columns = [all(a[i] @ b[i] > a[j] @ b[i] for j in range(n) if j != i) for i in range(n)]
    return np.mean(rows), np.mean(columns), np.mean(np.logical_and(rows, columns))


def naive_representations(model, tokenizer, sentences: list[str]) -> np.ndarray:
    """(boundaries, N, d): means over the content tokens, one unpadded sentence at a time, in float64."""
    means = []
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
        content = [token not in tokenizer.all_special_ids for token in ids[0].tolist()]
        means.append([state[0].double().numpy()[content].mean(axis=0) for state in states])
    return np.array(means).transpose(1, 0, 2)


def test_hits_by_hand() -> None:
    similarity = torch.tensor([[[0.9, 0.1, 0.0], [0.8, 0.7, 0.2], [0.3, 0.75, 0.6]]])
    rows, columns = top1_hits(similarity)
    assert rows.tolist() == [[True, False, False]]
    assert columns.tolist() == [[True, False, True]]


def test_a_tie_is_not_a_hit() -> None:
    same = torch.ones(1, 5, 8)
    assert retrieval_scores(same, same) == [(0.0, 0.0, 0.0)]
    apart = torch.eye(5)[None]
    assert retrieval_scores(apart, apart) == [(1.0, 1.0, 1.0)]
    copied = torch.eye(5)[[0, 1, 2, 3, 3]][None]  # the last two are exact copies: neither can be found
    assert retrieval_scores(copied, copied) == [(0.6, 0.6, 0.6)]


@pytest.mark.parametrize("noise", [0.3, 1.5, 4.0])
def test_scores_agree_with_loops(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(int(noise * 10))
    a = generator.normal(size=(5, 40, 12))
    b = a + noise * generator.normal(size=a.shape)
    wanted = [naive_scores(x, y) for x, y in zip(a, b, strict=True)]
    source, target = torch.from_numpy(a), torch.from_numpy(b)
    assert retrieval_scores(source, target) == pytest.approx(np.array(wanted))
    monkeypatch.setattr("shifcon_fast.evaluation.retrieval._SIMILARITIES_AT_ONCE", 40 * 40 * 2)
    assert retrieval_scores(source, target) == pytest.approx(np.array(wanted))


def test_a_model_is_measured_at_every_boundary(tiny_model, word_tokenizer, parallel_text) -> None:
    model = tiny_model()
    found = measure_retrieval(
        model, word_tokenizer, parallel_text, pivot="en", boundaries=range(4), matrix_boundary=2, batch_size=7
    )
    spaces = {
        code: naive_representations(model, word_tokenizer, texts) for code, texts in parallel_text.items()
    }
    assert list(found.scores) == ["de", "sw", "tr"]
    for code, scores in found.scores.items():
        wanted = [naive_scores(spaces[code][k], spaces["en"][k]) for k in range(4)]
        measured = list(zip(scores.to_pivot, scores.from_pivot, scores.mexa, strict=True))
        assert measured == pytest.approx(np.array(wanted)), code
    for i, query in enumerate(found.languages):
        for j, candidates in enumerate(found.languages):
            wanted = None if i == j else naive_scores(spaces[query][2], spaces[candidates][2])[0]
            assert found.matrix[i][j] == (None if wanted is None else pytest.approx(wanted)), (
                query,
                candidates,
            )


def test_little_memory_means_more_passes_and_the_same_numbers(
    tiny_model, word_tokenizer, parallel_text
) -> None:
    model = tiny_model()
    options = {"pivot": "de", "boundaries": [3, 1, 2], "matrix_boundary": 0}
    whole = measure_retrieval(model, word_tokenizer, parallel_text, **options)
    one_boundary = 4 * 32 * 24 * 4 / 2**30
    parts = measure_retrieval(model, word_tokenizer, parallel_text, memory_gib=one_boundary, **options)
    assert whole.boundaries == [1, 2, 3]
    assert len(whole.scores["en"].mexa) == 3
    assert parts == whole


def test_the_shift_moves_what_lies_behind_it(attached, word_tokenizer, parallel_text) -> None:
    model, texts = attached.model, parallel_text["sw"]
    plain = sentence_representations(model, word_tokenizer, texts, range(4), language="sw")
    shifted = sentence_representations(model, word_tokenizer, texts, range(4), language="sw", handle=attached)
    torch.testing.assert_close(shifted[0], plain[0], rtol=0, atol=0)
    vector = attached.shift.tables()[1][attached.shift.language_id("sw")]
    torch.testing.assert_close(shifted[1], plain[1] + vector)
    assert (shifted[2] - plain[2]).norm() > 0.1 * plain[2].norm()
    english = parallel_text["en"]
    pivot = sentence_representations(model, word_tokenizer, english, [3], language="en", handle=attached)
    untouched = sentence_representations(model, word_tokenizer, english, [3], language="en")
    torch.testing.assert_close(pivot, untouched, rtol=0, atol=0)


def test_shifted_scores_differ_only_from_the_area_on(attached, word_tokenizer, parallel_text) -> None:
    options = {"pivot": "en", "boundaries": range(4), "matrix_boundary": 1}
    plain = measure_retrieval(attached.model, word_tokenizer, parallel_text, **options)
    shifted = measure_retrieval(attached.model, word_tokenizer, parallel_text, handle=attached, **options)
    for code in ("de", "sw", "tr"):
        assert shifted.scores[code].mexa[0] == plain.scores[code].mexa[0]
    assert shifted.matrix != plain.matrix


def test_copies_are_counted() -> None:
    assert duplicates(["a", "b", "a", "c", "a"]) == 3
    assert duplicates(["a", "b"]) == 0


def test_bad_input_is_named(tiny_model, word_tokenizer) -> None:
    model = tiny_model()
    options = {"boundaries": [0], "matrix_boundary": 0}
    with pytest.raises(ValueError, match="pivot is 'en', which is not in the data; it has de, sw"):
        measure_retrieval(model, word_tokenizer, {"de": ["a"], "sw": ["b"]}, pivot="en", **options)
    with pytest.raises(ValueError, match="wanted the same number in every language"):
        measure_retrieval(model, word_tokenizer, {"de": ["a"], "en": ["b", "c"]}, pivot="en", **options)
    with pytest.raises(ValueError, match="at least two"):
        measure_retrieval(model, word_tokenizer, {"de": ["a"], "en": ["b"]}, pivot="en", **options)
    with pytest.raises(
        ValueError, match=r"parallel\['en'\]\[1\] has 201 tokens; the model's context holds 128"
    ):
        texts = {"de": ["Rom", "Rom"], "en": ["Rome", "Rome " * 200]}
        measure_retrieval(model, word_tokenizer, texts, pivot="en", **options)
