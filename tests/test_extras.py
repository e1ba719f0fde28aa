"""A core installation, without the packages of any extra: what works, and what says which extra it needs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from shifcon_fast.extras import EXTRAS, MissingExtraError, needed_for

REPOSITORY = Path(__file__).resolve().parents[1]

# Python finds none of the optional packages: as if they were not installed, also for who asks whether they are.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def run(code: str, *arguments: object, hidden: tuple[str, ...] | None = None) -> Any:
    """What ``code`` prints last, as JSON, in a Python without the modules ``hidden`` (None: of all extras)."""
    names = hidden if hidden is not None else tuple(name for modules in EXTRAS.values() for name in modules)
    result = subprocess.run(
        [sys.executable, "-c", f"HIDDEN = {names!r}\n{HIDE}\n{code}", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


CORE = """
import json
import logging
import torch
import shifcon_fast as sf
from peft import LoraConfig
from shifcon_fast.extras import MissingExtraError
from transformers import AutoTokenizer

base, folder, files = sys.argv[1:]
said = []
class Notes(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("shifcon_fast").addHandler(Notes())

text = {
    "en": ["Ada lives in Rome", "Ben has a red cat", "Eva eats bread and fish", "Ada has a red cat"],
    "sw": ["Ada anaishi Roma", "Ben ana paka mwekundu", "Eva anakula mkate na samaki", "Ada ana paka mwekundu"],
}
y, h = sf.ops.add_shift_rms_norm(torch.ones(2, 8), torch.ones(8))
tokenizer = AutoTokenizer.from_pretrained(base)
model = sf.load_quantized(base, lora=LoraConfig(r=2, target_modules="all-linear"), quantization="none")
space = sf.estimate_space(model, tokenizer, text, progress=False)
sweep = sf.sweep_area(model, tokenizer, space, text, areas=[(1, 2)], progress=False)
sf.recommend_area(space, max_perplexity_rise=1e9)
rows = [{"lang": "sw", "prompt": "Ada anaishi", "response": "Roma"}] * 2
arguments = {"forward": 1, "backward": 3, "max_steps": 1, "contrastive_batch_size": 2, "disable_tqdm": True}
trainer = sf.ShifConTrainer(
    model=model, processing_class=tokenizer, space=space, parallel=text, train_dataset=rows,
    args=sf.ShifConArguments(folder, use_cpu=True, **arguments),
)
trainer.train()
sf.ShifConArguments(folder, use_cpu=True, **arguments)
trained = sf.load(folder)
ids = trained.shifcon.language_ids(["swh_Latn"])
answer = trained.generate(**tokenizer(["Ada anaishi"], return_tensors="pt"), language_ids=ids, max_new_tokens=2)
trained.shifcon.detach()
with sf.attach(trained, space, 1, 2) as handle:
    handle.language_ids(["sw"])
loaded = [name for name in HIDDEN if name in sys.modules]
refused = {}
"""
PRINT = """
shape = list(answer.shape)
print(json.dumps({"said": said, "shape": shape, "areas": len(sweep.areas), "loaded": loaded, "refused": refused}))
"""


# What is asked for → the code, and what the error says.
REFUSED = {
    "tensorboard": (
        "sf.ShifConArguments(files, report_to='tensorboard', use_cpu=True)",
        r"report_to: tensorboard needs tensorboard, .*\[cli\]",
    ),
    "hub": (
        "from shifcon_fast.data import read_parallel; read_parallel('owner/name')",
        r"owner/name is no file, and a Hugging Face dataset needs datasets, .*\[data\]",
    ),
    "parquet": (
        "from shifcon_fast.data import read_parallel; read_parallel(files + '/a.parquet')",
        r"a\.parquet: Parquet needs pyarrow, .*\[data\]",
    ),
    "open questions": (
        "from shifcon_fast.evaluation.evaluate import evaluate; from shifcon_fast.data import Question\n"
        "    evaluate(torch.nn.Linear(1, 1), None, questions=[Question(0, 'en', '1 + 1?', 2)])",
        r"reading answers to open questions needs (babel|py3langid), .*\[eval\]",
    ),
    "a number": (
        "from shifcon_fast.evaluation.grading import is_correct; is_correct('18', 18, 'en')",
        r"reading numbers in answers needs babel, .*\[eval\]",
    ),
    "the language of an answer": (
        "from shifcon_fast.evaluation.answer_language import AnswerLanguage; AnswerLanguage(['en'])",
        r"telling the language of an answer needs py3langid, .*\[eval\]",
    ),
    "a report": (
        "from shifcon_fast.evaluation.report import report_folder; report_folder(files)",
        r"a picture needs matplotlib, .*\[eval\]",
    ),
    "CLDR": ("import shifcon_fast.data.cldr", r"questions from CLDR needs babel, .*\[eval\]"),
    "the command": ("import shifcon_fast.cli", r"the shifcon command needs typer, .*\[cli\]"),
}


@pytest.fixture(scope="module")
def core(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a core installation does and says, in one process; its run folder."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "a.parquet").write_bytes(b"PAR1")
    asked = "".join(
        f"try:\n    {code}\nexcept MissingExtraError as error:\n    refused[{name!r}] = str(error)\n"
        for name, (code, _) in REFUSED.items()
    )
    return run(CORE + asked + PRINT, tiny_checkpoint, folder / "run", folder), folder / "run"


def test_operators_attaching_and_training_need_no_extra(core: tuple[dict[str, Any], Path]) -> None:
    found, folder = core
    assert found["loaded"] == []
    assert found["shape"][0] == 1
    assert found["areas"] == 1
    assert (folder / "training_log.json").is_file()
    assert not (folder / "runs").exists()
    notes = [note for note in found["said"] if "tensorboard" in note]
    assert len(notes) == 1  # once, though two sets of arguments were made
    assert notes[0].startswith("report_to: tensorboard is not installed")
    assert 'pip install "shifcon-fast[cli]"' in notes[0]


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_the_extra(core: tuple[dict[str, Any], Path], name: str) -> None:
    said = core[0]["refused"][name]
    assert re.search(REFUSED[name][1], said)
    assert re.search(r'which is not installed: pip install "shifcon-fast\[\w+\]"$', said)


COMMANDS = """
import io, json
from contextlib import redirect_stderr
from shifcon_fast.__main__ import main

found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["shifcon", *arguments]
    try:
        with redirect_stderr(io.StringIO()) as printed:
            main()
    except SystemExit as end:
        said = printed.getvalue() + (end.code if isinstance(end.code, str) else "")
        found.append([end.code if isinstance(end.code, int) else 1, " ".join(said.split())])
print(json.dumps(found))
"""


def shifcon(*commands: tuple[object, ...], hidden: tuple[str, ...]) -> list[tuple[int, str]]:
    """(exit code, what was printed on standard error, on one line) of each command."""
    arguments = json.dumps([[str(each) for each in command] for command in commands])
    return [(code, said) for code, said in run(COMMANDS, arguments, hidden=hidden)]


def test_the_command_without_its_packages_says_so_in_a_line() -> None:
    said = 'error: the shifcon command needs typer, which is not installed: pip install "shifcon-fast[cli]"'
    assert shifcon(("doctor",), hidden=EXTRAS["cli"]) == [(1, said)]


@pytest.mark.slow("runs four commands, with an import of everything")
def test_commands_without_the_packages_of_a_report(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """``profile`` leaves its picture out, ``evaluate`` refuses open questions before it opens a model."""
    rows = [
        {"en": "Ada lives in Rome", "sw": "Ada anaishi"},
        {"en": "Ben has a red cat", "sw": "Ben ana paka"},
    ]
    parallel, questions, space = tmp_path / "p.jsonl", tmp_path / "q.jsonl", tmp_path / "space"
    parallel.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions.write_text('{"answer": 2, "en": "1 + 1?"}\n')
    common = ("--model", tiny_checkpoint, "--parallel", parallel, "--quantization", "none")
    profiled, evaluated, reported, examined = shifcon(
        ("profile", *common, "--output", space),
        ("evaluate", "--model", "no-such-model", "--questions", questions, "--output", tmp_path / "results"),
        ("report", space),
        ("doctor",),
        hidden=(*EXTRAS["eval"], *EXTRAS["data"]),
    )
    assert profiled[0] == 0, profiled[1]
    assert (space / "area.json").is_file()
    assert not (space / "distance.svg").exists()
    assert evaluated[0] == reported[0] == 1
    assert examined[0] == 0
    assert "error: reading answers to open questions needs" in evaluated[1]
    assert "error: a picture needs matplotlib" in reported[1]
    assert 'pip install "shifcon-fast[eval]"' in evaluated[1]
    assert 'pip install "shifcon-fast[eval]"' in reported[1]


# --- the lists ---------------------------------------------------------------------------------------------------


def test_an_error_of_another_kind_is_left_alone() -> None:
    with pytest.raises(ModuleNotFoundError) as caught, needed_for("a test"):
        import no_such_module_at_all  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)
    with pytest.raises(ImportError) as other, needed_for("a test"):
        from json import no_such_name  # noqa: F401
    assert not isinstance(other.value, MissingExtraError)


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11 has what reads it")
    found: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    return found


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=;! ]", requirement)[0].lower().replace("_", "-")


def modules_of(distributions: set[str]) -> set[str]:
    owners = packages_distributions()
    return {
        module
        for module, names in owners.items()
        if distributions & {name.lower().replace("_", "-") for name in names}
    }


def test_the_extras_are_those_of_the_project() -> None:
    optional = project()["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert set(modules) <= modules_of({distribution(each) for each in optional[extra]}), extra
        assert len(modules) == len(optional[extra]), extra
        assert f"| `{extra}` | " in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert optional["all"] == [f"shifcon-fast[{','.join(EXTRAS)}]"]
    assert "shifcon-fast[all]" in optional["test"]


def imports(node: ast.AST, guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported top-level module, and whether it is guarded: inside ``needed_for``, or for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], guarded) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield (child.module or "").partition(".")[0], guarded
        calls = [item.context_expr for item in child.items] if isinstance(child, ast.With) else []
        is_guard = any(
            isinstance(call, ast.Call) and ast.unparse(call.func) == "needed_for" for call in calls
        )
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from imports(child, guarded or is_guard or for_types)


def test_what_is_imported_is_a_dependency_and_what_is_optional_is_guarded() -> None:
    core = modules_of({distribution(each) for each in project()["dependencies"]})
    optional = {module for modules in EXTRAS.values() for module in modules}
    known = {*core, *sys.stdlib_module_names, "shifcon_fast"}
    known |= {"tokenizers", "huggingface_hub"}  # of transformers, whose versions they follow
    problems = []
    for file in sorted((REPOSITORY / "shifcon_fast").rglob("*.py")):
        for module, guarded in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module not in known and not (module in optional and guarded):
                problems.append(f"{file.relative_to(REPOSITORY)}: {module}")
    assert problems == []
    assert not core & optional
