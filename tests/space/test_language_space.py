"""The language space: its formulas, and its two files on disk, whole, damaged, foreign and interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shifcon_fast.space import space_folder
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.space_folder import CARD, TENSORS
from shifcon_fast.storage import sha256_file

L, K, D = 4, 3, 6
LANGUAGES = ("sw", "en", "tr")


def make_space(*, subspaces: bool = True, seed: int = 0) -> LanguageSpace:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    pairs = [(k, language) for k in range(L) for language in LANGUAGES]
    ranks = {pair: 1 + i % 3 for i, pair in enumerate(pairs)}
    return LanguageSpace(
        LANGUAGES,
        "en",
        random(L, K, D),
        {"sw": 7, "en": 8, "tr": 9},
        random(L),
        random(L, K),
        random(L, K),
        bases={pair: torch.linalg.qr(random(D, k)).Q for pair, k in ranks.items()} if subspaces else {},
        variances={pair: random(k) for pair, k in ranks.items()} if subspaces else {},
        ridge=random(L).double() if subspaces else None,
        floors=random(L, K) if subspaces else None,
        split_distances=random(L, K) if subspaces else None,
        card={
            "model": {"fingerprint": {"hidden_size": D}},
            "recipe": "stable",
            "tokenizer": {"bos_token": "<s>"},
        },
    )


def assert_equal(a: LanguageSpace, b: LanguageSpace) -> None:
    assert (a.languages, a.pivot, a.counts, a.card) == (b.languages, b.pivot, b.counts, b.card)
    for name in ("mean", "rms", "median_norm", "sink_share", "ridge", "floors", "split_distances"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None and other is None) or torch.equal(one, other), name
        assert one is None or one.dtype == other.dtype
    for one, other in ((a.bases, b.bases), (a.variances, b.variances)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_shift_vectors_point_to_the_pivot_and_are_exactly_zero_for_it() -> None:
    space = make_space()
    shift = space.shift_vectors(2)
    assert shift.dtype == torch.float32
    assert torch.equal(shift[1], torch.zeros(D))
    assert torch.equal(shift[0], space.mean[2, 1] - space.mean[2, 0])
    assert torch.equal(shift[2], space.mean[2, 1] - space.mean[2, 2])


def test_mean_gap_is_the_shift_over_the_rms() -> None:
    space = make_space()
    expected = (space.mean[3, 2].double() - space.mean[3, 1].double()).norm() / space.rms[3].double()
    assert space.mean_gap(3, "tr") == pytest.approx(float(expected), rel=1e-6)
    assert space.mean_gap(3, "en") == 0.0


def test_dose_is_the_shift_over_the_languages_median_norm() -> None:
    space = make_space()
    shift = (space.mean[3, 2].double() - space.mean[3, 1].double()).norm()
    expected = float(shift / space.median_norm[3, 2].double())
    assert space.dose(3, "tr") == pytest.approx(expected, rel=1e-6)
    assert space.dose(3, "tr", alpha=-0.5) == pytest.approx(expected / 2, rel=1e-6)
    assert space.dose(3, "en") == 0.0


def test_facts_and_ids() -> None:
    space = make_space()
    assert (space.num_boundaries, space.hidden_size, space.boundaries) == (L, D, (0, 1, 2, 3))
    assert [space.language_id(language) for language in LANGUAGES] == [0, 1, 2]
    with pytest.raises(ValueError, match="language: got 'fr'; wanted one of sw, en, tr"):
        space.language_id("fr")


def test_floor_is_per_language_or_their_mean_without_the_unknown() -> None:
    space = make_space()
    assert space.floors is not None
    assert space.noise_floor(1, "tr") == pytest.approx(float(space.floors[1, 2]))
    assert space.noise_floor(1) == pytest.approx(float(space.floors[1].mean()), rel=1e-6)
    space.floors[1, 0] = float("nan")
    assert space.noise_floor(1) == pytest.approx(float(space.floors[1, 1:].mean()), rel=1e-6)


@pytest.mark.parametrize("boundary", [-1, L])
def test_boundaries_out_of_range_are_refused_everywhere(boundary: int) -> None:
    space = make_space()
    calls: list[Callable[[], object]] = [
        lambda: space.shift_vectors(boundary),
        lambda: space.subspace(boundary, "sw"),
        lambda: space.distance(boundary, "sw", "en"),
        lambda: space.noise_floor(boundary),
        lambda: space.split_distance(boundary, "sw"),
        lambda: space.mean_gap(boundary, "sw"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"boundary: got {boundary}; this space has boundaries 0 … 3"):
            call()


def test_a_space_without_subspaces_says_so() -> None:
    space = make_space(subspaces=False)
    with pytest.raises(ValueError, match="no subspaces at boundary 1"):
        space.distance(1, "sw", "en")
    with pytest.raises(ValueError, match="no distances were measured"):
        space.noise_floor(1)


def test_replaced_means_leave_the_old_space_alone() -> None:
    space = make_space()
    before, new = space.mean.clone(), torch.randn(L, K, D, dtype=torch.float64)
    replaced = space.replace_means(new)
    assert torch.equal(replaced.mean, new.float())
    new.zero_()
    assert replaced.mean.abs().sum() > 0  # a copy: later changes of the source do not show
    assert torch.equal(space.mean, before)
    assert replaced.bases is space.bases
    assert torch.equal(replaced.subspace(1, "tr").mean, replaced.mean[1, 2])
    with pytest.raises(ValueError, match=r"mean: got shape \(4, 3, 5\); wanted \(4, 3, 6\)"):
        space.replace_means(torch.zeros(L, K, D - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ("en", "en", "sw")}, "languages: got .*; wanted every code once"),
        ({"pivot": "fr"}, "pivot: got 'fr'"),
        ({"mean": torch.zeros(L, K + 1, D)}, r"mean: got shape \(4, 4, 6\)"),
        ({"rms": torch.zeros(L + 1)}, r"rms: got shape \(5,\); wanted \(4,\)"),
        ({"floors": torch.zeros(L)}, r"floors: got shape \(4,\); wanted \(4, 3\)"),
        ({"bases": {(0, "en"): torch.zeros(D, 2)}, "variances": {}}, "same .* pairs"),
        (
            {"bases": {(0, "en"): torch.zeros(D, 2)}, "variances": {(0, "en"): torch.zeros(3)}},
            r"bases\[\(0, 'en'\)\]: got shape \(6, 2\); wanted \(6, 3\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    parts = {
        "languages": LANGUAGES,
        "pivot": "en",
        "mean": torch.zeros(L, K, D),
        "counts": dict.fromkeys(LANGUAGES, 2),
        "rms": torch.ones(L),
        "median_norm": torch.ones(L, K),
        "sink_share": torch.zeros(L, K),
    }
    with pytest.raises(ValueError, match=message):
        LanguageSpace(**{**parts, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("subspaces", [True, False])
def test_save_and_load_keep_every_bit(tmp_path: Path, subspaces: bool) -> None:
    space = make_space(subspaces=subspaces)
    space.mean[2] = float("nan")  # a boundary that was not estimated
    (tmp_path / "notes.txt").write_text("keep")
    space.save(tmp_path)
    loaded = LanguageSpace.load(tmp_path)
    assert loaded.boundaries == (0, 1, 3)
    assert torch.equal(loaded.mean.isnan(), space.mean.isnan())
    space.mean[2], loaded.mean[2] = 0, 0
    assert_equal(loaded, space)
    # No hidden leftovers, and the neighbours stay.
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["language_space.json", "language_space.safetensors", "notes.txt"]


def test_card_on_disk_describes_the_tensors(tmp_path: Path) -> None:
    make_space().save(tmp_path)
    card = json.loads((tmp_path / CARD).read_text(encoding="utf-8"))
    assert card["format"] == "shifcon_fast.language_space"
    assert card["format_version"] == 1
    assert card["languages"] == list(LANGUAGES)
    assert card["pivot"] == "en"
    assert card["boundaries"] == [0, 1, 2, 3]
    assert card["sentences"] == {"sw": 7, "en": 8, "tr": 9}
    assert (card["num_boundaries"], card["hidden_size"]) == (L, D)
    assert card["card"]["model"]["fingerprint"] == {"hidden_size": D}
    assert card["tensors"]["sha256"] == sha256_file(tmp_path / TENSORS)


def test_saving_over_another_space_replaces_it(tmp_path: Path) -> None:
    make_space(seed=1).save(tmp_path)
    newer = make_space(subspaces=False, seed=2)
    newer.save(tmp_path)
    assert_equal(LanguageSpace.load(tmp_path), newer)


@pytest.mark.parametrize("step", ["save_file", "write_json"])
def test_a_save_that_fails_half_way_leaves_the_old_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = make_space(seed=1)
    old.save(tmp_path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(space_folder, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_space(seed=2).save(tmp_path)
    assert_equal(LanguageSpace.load(tmp_path), old)
    assert len(list(tmp_path.iterdir())) == 2


def rewrite_card(folder: Path, **changes: object) -> None:
    path = folder / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors and make the checksum fit, as another program might."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    rewrite_card(folder, tensors={"file": TENSORS, "sha256": sha256_file(folder / TENSORS)})


def flip_a_bit(folder: Path) -> None:
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def not_safetensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"not tensors")
    rewrite_card(folder, tensors={"file": TENSORS, "sha256": sha256_file(folder / TENSORS)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CARD).unlink(), r"language_space\.json: no such file; wanted the card"),
        (lambda f: (f / CARD).write_text("{"), r"language_space\.json: not valid JSON"),
        (lambda f: (f / CARD).write_text("[]"), "holds a JSON list"),
        (lambda f: rewrite_card(f, format="gguf"), "format is 'gguf'; wanted 'shifcon_fast.language_space'"),
        (lambda f: rewrite_card(f, format_version=2), "format_version is 2; this release reads 1"),
        (lambda f: rewrite_card(f, card=None), r"language_space\.json: card: .* got None"),
        (lambda f: rewrite_card(f, tensors={}), r"language_space\.json: lacks 'tensors\.file'"),
        (
            lambda f: rewrite_card(f, card={"model": {"fingerprint": 7}}),
            r"card\.model\.fingerprint: .* got 7",
        ),
        (lambda f: rewrite_card(f, sentences={"en": 8}), r"counts: got \['en'\]"),
        (lambda f: rewrite_card(f, pivot="fr"), "pivot: got 'fr'"),
        (lambda f: rewrite_card(f, languages=["en"]), r"mean: got shape \(4, 3, 6\)"),
        (lambda f: rewrite_card(f, languages=7), r"language_space\.json: languages: .* got 7"),
        (lambda f: rewrite_card(f, hidden_size=8), "4 boundaries of hidden size 8, the tensors hold 4 of 6"),
        (lambda f: (f / TENSORS).unlink(), r"language_space\.safetensors: no such file, though"),
        (flip_a_bit, "its SHA-256 is not the one"),
        (lambda f: (f / TENSORS).write_bytes(b""), "its SHA-256 is not the one"),
        (not_safetensors, "not a safetensors file"),
        (lambda f: rewrite_tensors(f, lambda t: t.pop("mean")), "lacks 'mean'"),
        (lambda f: rewrite_tensors(f, lambda t: t.pop("ridge")), "lacks 'ridge'"),
        (lambda f: rewrite_tensors(f, lambda t: t.pop("variances.1.sw")), "variances: must hold the same"),
        (lambda f: rewrite_tensors(f, lambda t: t.update({"rms": torch.zeros(9)})), r"rms: got shape \(9,\)"),
        (lambda f: rewrite_tensors(f, lambda t: t.update({"basis.x.en": torch.zeros(1)})), "damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    make_space().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        LanguageSpace.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_loading_a_folder_that_does_not_exist_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        LanguageSpace.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_language_is_found_however_it_is_written() -> None:
    space = make_space()
    assert [space.language_id(code) for code in ("sw", "swh_Latn", "eng", "en-US", "tur_Latn")] == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert space.subspace(1, "swh_Latn").basis is space.subspace(1, "sw").basis
    assert space.distance(1, "sw", "swh") == 0.0
    with pytest.raises(
        ValueError, match=r"got 'en-GB'; wanted one of sw, en, tr; if 'en' is meant, write that"
    ):
        space.language_id("en-GB")
