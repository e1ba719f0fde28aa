"""The report says what the numbers say, escapes what it is given, and needs nothing beside itself."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.across_seeds import paired_seeds_interval, seeds_interval
from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.cells import percent, points, verdict
from shifcon_fast.evaluation.choice_scores import choice_accuracy
from shifcon_fast.evaluation.comparison import PairedComparison, compare
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.page import Cell, Picture, Section, Table, Text
from shifcon_fast.evaluation.report import report_folder, write_report
from shifcon_fast.evaluation.sections import comparison_sections
from shifcon_fast.evaluation.system_comparison import ItemOutcome, SystemComparison
from shifcon_fast.evaluation.systems_table import systems_table
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.space.area import recommend_area


class Checker(HTMLParser):
    """Collects tags that are left open and everything that a page would load or run."""

    VOID = frozenset({"meta", "source", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "iframe", "object"):
            self.loads.append(tag)
        self.loads += [
            v for k, v in attrs if k in ("src", "srcset", "href") and v and not v.startswith(("data:", "#"))
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.loads == []
    assert "url(" not in html
    return checker


def outcomes(right: str, prefix: str = "") -> list[ItemOutcome]:
    half = len(right) // 2
    groups = ["seen only in English"] * half + ["seen in this language"] * (len(right) - half)
    return [
        ItemOutcome(f"{prefix}{i}", group, mark == "1")
        for i, (mark, group) in enumerate(zip(right, groups, strict=True))
    ]


@pytest.fixture
def comparison() -> SystemComparison:
    weak, better = "0000010000" * 4 + "1" * 40, "1111110111" * 4 + "1" * 40
    full, worse = "1" * 80, "0" * 40 + "1" * 40
    plain = {seed: {"en": outcomes(full), "de": outcomes(weak), "sw": outcomes(weak)} for seed in ("1", "2")}
    ours = {
        seed: {"en": outcomes(worse), "de": outcomes(better), "sw": outcomes(weak)} for seed in ("1", "2")
    }
    logs = {"ShifCon": {"1": [{"step": 1, "loss_generation": 2.0}, {"step": 2, "loss_generation": 1.0}]}}
    return SystemComparison(
        "en",
        "plain QLoRA",
        {"before": plain, "plain QLoRA": plain, "ShifCon": ours},
        "before",
        logs,
        headline="seen only in English",
    )


def test_shares_and_differences_are_those_of_seeds_and_questions(comparison: SystemComparison) -> None:
    group = "seen only in English"
    assert comparison.systems == ["before", "plain QLoRA", "ShifCon"]
    assert comparison.contenders == ["ShifCon"]
    assert comparison.languages == ["en", "de", "sw"]
    assert comparison.groups == [group, "seen in this language"]
    weak = [float(mark) for mark in "0000010000" * 4]
    by_seed = {seed: dict(enumerate(weak)) for seed in "12"}
    assert comparison.share("plain QLoRA", ["de"], group) == seeds_interval(by_seed)
    better = [float(mark) for mark in "1111110111" * 4]
    averaged = {
        seed: {i: (b + w) / 2 for i, (b, w) in enumerate(zip(better, weak, strict=True))} for seed in "12"
    }
    assert comparison.share("ShifCon", ["de", "sw"], group) == seeds_interval(averaged)
    assert comparison.difference("ShifCon", "plain QLoRA", ["de", "sw"], group) == paired_seeds_interval(
        averaged, by_seed
    )


def test_the_table_names_gains_losses_noise_and_the_pivot(comparison: SystemComparison) -> None:
    head, before, plain, ours = systems_table(comparison).splitlines()
    assert "seen only in English: mean of de, sw; pivot en" in head
    assert "over 2 seeds and the questions" in head
    assert before.split() == ["before", "10.0", "%", "100.0", "%"]
    assert plain.split() == ["plain", "QLoRA", "10.0", "%", "100.0", "%"]
    assert "+40.0 points [" in ours
    assert ours.endswith("−100.0 points [−100.0, −100.0]")
    same = replace(comparison, outcomes={**comparison.outcomes, "ShifCon": comparison.outcomes["before"]})
    assert systems_table(same).splitlines()[-1].count("within noise") == 2


def test_numbers_in_words() -> None:
    assert percent(Interval(0.481, 0.44, 0.522)) == "48.1 % [44.0, 52.2]"
    assert points(Interval(-0.023, -0.05, 0.004)) == "−2.3 points [−5.0, +0.4]"
    wanted = {(0.1, 0.01, 0.2): "gain", (-0.1, -0.2, -0.01): "loss", (0.1, -0.01, 0.2): "within noise"}
    assert {bounds: verdict(Interval(*bounds)) for bounds in wanted} == wanted


def test_the_comparison_page(comparison: SystemComparison, tmp_path) -> None:
    path = write_report(tmp_path, "The demo", comparison_sections(comparison), subtitle="Two systems")
    assert path == tmp_path / "report.html"
    page = check(path.read_text(encoding="utf-8"))
    for heading in ("Summary", "Against plain QLoRA", "Right answers", "Training"):
        assert heading in page.text
    assert "+80.0" in page.text
    assert "55.0 · 55.0" in page.text  # each seed on its own
    html = path.read_text(encoding="utf-8")
    assert html.count("<picture>") == 4
    assert '<mark class="loss">−100.0</mark>' in html
    assert '<mark class="gain">+80.0</mark>' in html


def test_a_comparison_survives_its_file(comparison: SystemComparison, tmp_path) -> None:
    comparison.save(tmp_path / "c.json")
    assert SystemComparison.load(tmp_path / "c.json") == comparison
    (tmp_path / "c.json").write_text('{"kind": "evaluation"}')
    with pytest.raises(ValueError, match=r"c\.json: kind is 'evaluation'; wanted 'system comparison'"):
        SystemComparison.load(tmp_path / "c.json")
    with pytest.raises(
        ValueError, match="outcomes has no system 'QLoRA'; it has before, plain QLoRA, ShifCon"
    ):
        SystemComparison("en", "QLoRA", comparison.outcomes)
    with pytest.raises(ValueError, match="lack the pivot 'fr'"):
        SystemComparison("fr", "before", comparison.outcomes)


def test_all_text_is_escaped(tmp_path) -> None:
    bad = "<script>alert(1)</script>"
    sections = [
        Section(
            bad,
            [
                Text([bad]),
                Table([bad], [[bad, bad, Cell(bad, bad)]], bad),
                Picture(b"<svg/>", b"<svg/>", alt='"><script>', caption=bad),
            ],
        ),
        Section("left out"),
    ]
    html = write_report(tmp_path / "x" / "page.html", bad, sections, subtitle=bad, footer=bad).read_text(
        "utf-8"
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") == 13  # every place once
    assert "left out" not in html


def test_a_page_is_replaced_in_one_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_report(tmp_path, "first", [])

    def full_disk(*args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, "second", [])
    assert "<h1>first</h1>" in target.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_report_of_an_evaluation(attached, tiny_model, word_tokenizer, parallel_text, tmp_path) -> None:
    questions = [
        Question(0, "en", "Ada lives in ?", "Rome"),
        Question(0, "sw", "Ada anaishi ?", 3),
        Question(1, "en", "Ada lives in", "Rome", ("Rome", "fish"), "place"),
        Question(1, "sw", "Ada anaishi", "Roma", ("Roma", "samaki"), "place"),
        Question(2, "sw", "Ben ana", "paka", ("Roma", "paka"), "animal"),
    ]
    options = {"max_new_tokens": 2, "progress": False}
    ours = evaluate(attached.model, word_tokenizer, parallel_text, questions, **options)
    theirs = evaluate(tiny_model(), word_tokenizer, parallel_text, questions, **options)
    ours.save(tmp_path)
    theirs.save(tmp_path / "against")
    against = compare(ours, theirs)
    (tmp_path / "comparison.json").write_text(json.dumps(against.to_json()))
    assert PairedComparison.load(tmp_path / "comparison.json") == against
    page = check(report_folder(tmp_path).read_text(encoding="utf-8"))
    for heading in (
        "Answers",
        "Multiple choice",
        "Retrieval",
        "Perplexity",
        "Settings and versions",
    ):
        assert heading in page.text
    right = choice_accuracy(ours.multiple_choice["shifted"])["sw"]
    assert f"{100 * right.estimate:.1f} %" in page.text
    assert f"[{100 * right.low:.1f}, {100 * right.high:.1f}]" in page.text
    for text in (
        "shifted − unshifted",
        "Chance is 50 %",
        "Right choices (acc) by kind",
    ):
        assert text in page.text
    assert f"{ours.perplexity['shifted']['tr'].value:,.2f}" in page.text
    found = ours.retrieval["shifted"]
    mexa = [value for scores in found.scores.values() for value in scores.mexa]
    assert f"{100 * sum(mexa) / len(mexa):.1f} % shifted" in page.text
    assert "+0.0" in page.text  # the pivot's answers, which no shift touches


def test_the_report_of_a_run(tiny_model, word_tokenizer, parallel_text, tmp_path) -> None:
    space = estimate_space(tiny_model(), word_tokenizer, parallel_text, progress=False)
    space.save(tmp_path)
    area = recommend_area(space)
    profile = check(report_folder(tmp_path, tmp_path / "profile.html").read_text(encoding="utf-8"))
    assert area.reason in profile.text
    assert f"at boundary {area.forward} and back at boundary {area.backward}" in profile.text
    (tmp_path / "area.json").write_text(json.dumps(asdict(area)))
    log = {"steps": [{"step": 1, "loss_generation": 2.0, "loss_contrastive": 1.0}], "evaluations": []}
    (tmp_path / "training_log.json").write_text(json.dumps(log))
    card = {"base_model": "org/model", "area": {"forward": 1, "backward": 2}, "training": {"max_steps": 7}}
    (tmp_path / "shifcon.json").write_text(json.dumps({**card, "versions": {"torch": "2.13"}}))
    html = report_folder(tmp_path).read_text(encoding="utf-8")
    page = check(html)
    assert "Fine-tuned from org/model." in page.text
    assert "at boundary 1 and back at boundary 2" in page.text
    assert re.search(r"max_steps</th><td>7</td>", html)
    assert html.count("<picture>") == 2


def test_a_folder_without_anything_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds none of"):
        report_folder(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        report_folder(tmp_path / "nowhere")
