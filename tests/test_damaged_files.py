"""Any bytes in any of our files give an error that names the file, and reading touches nothing.

Every file is damaged in thousands of ways (each key of its JSON exchanged for something else, bits, lengths, tensor
headers that lie), with the checksums made to fit where they would otherwise end the attempt early. After each
attempt the folder and everything around it must be what it was, to the last time stamp.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, TrainerState

import shifcon_fast as sf
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.comparison import PairedComparison, compare
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.report import _read as read_folder
from shifcon_fast.evaluation.report import report_folder
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.system_comparison import ItemOutcome, SystemComparison
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.objective.vectors import LanguageVectors
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import sha256_file, write_json
from shifcon_fast.training.attaching import check_same_run
from shifcon_fast.training.config import parse_config
from shifcon_fast.training.language_vectors import load_vectors
from shifcon_fast.training.run.checkpoints import list_checkpoints
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.run.run_folder import RunState, save_run
from shifcon_fast.training.run.shift_file import read_shift

SEED = 20250711


Damage = Callable[[], bytes]


class World(NamedTuple):
    """A folder with one good example of everything, and a model to load it with."""

    root: Path
    base: Path
    handle: ShiftHandle
    vectors: LanguageVectors
    pages: Path


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
) -> World:
    root = tmp_path_factory.mktemp("around") / "root"
    text = {language: sentences[:6] for language, sentences in parallel_text.items()}
    model = sf.load_quantized(
        tiny_checkpoint, LoraConfig(r=2, target_modules=["q_proj"]), "none", gradient_checkpointing=False
    )
    space = sf.estimate_space(model, word_tokenizer, text, rank=2, progress=False)
    area = sf.recommend_area(space)
    questions = [Question(0, "en", "Ada lives in ?", "Rome"), Question(0, "sw", "Ada anaishi ?", 3)]
    settings: dict[str, Any] = {"max_new_tokens": 2, "progress": False}
    before = evaluate(model.eval(), word_tokenizer, text, questions, **settings)
    handle = sf.attach(model, space, forward=1, backward=3)
    after = evaluate(model, word_tokenizer, text, questions, **settings)
    log = [{"step": k, "loss": 1.0, "loss_generation": 1.0, "loss_contrastive": 2.0} for k in (1, 2, 3)]

    space.save(root / "space")
    write_json(root / "space" / "area.json", asdict(area))
    run = root / "run"
    save_run(run, model, RunState(handle, tokenizer=word_tokenizer, log=log))
    after.save(run)
    before.save(run / "against")
    write_json(run / "comparison.json", compare(after, before).to_json())
    vectors = LanguageVectors(space.shift(1, 3))
    shutil.copytree(run, run / "checkpoint-3")
    save_file(vectors.state_dict(), run / "checkpoint-3" / "language_vectors.safetensors")
    TrainerState(global_step=3, max_steps=3).save_to_json(str(run / "checkpoint-3" / "trainer_state.json"))
    outcomes = {
        "1": {code: [ItemOutcome("0", "all", True), ItemOutcome("1", "all", False)] for code in ("en", "sw")}
    }
    systems = SystemComparison(
        "en", "plain", {"plain": outcomes, "ours": outcomes}, logs={"ours": {"1": log}}
    )
    systems.save(root / "systems.json")
    (root / "run.yaml").write_text(
        "model: m\nparallel: p.jsonl\ninstructions: [i.jsonl]\noutput: out\nmax_steps: 3\nlearning_rate: 1e-4\n"
        "languages: [en, sw]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    (root.parent / "precious.txt").write_text("outside of every folder that is read")
    return World(root, tiny_checkpoint, handle, vectors, tmp_path_factory.mktemp("pages"))


def state_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a write, a deletion or a rename would change."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        stat = path.lstat()
        found[str(path)] = (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


# --- how files are damaged ----------------------------------------------------------------------------------------

YAML = [
    *(
        "",
        "~",
        "2001-99-99",
        "2001-01-01",
        "!!int ''",
        "!!bool x",
        "!!timestamp x",
        "!!python/object:os.system x",
    ),
    *(
        "!!binary é",
        "&a b",
        "*a",
        "1" * 5000,
        "1e999",
        ".nan",
        "0b_",
        "-_",
        "1:99",
        "yes",
        "'",
        "{",
        "@",
        "%",
        "\t",
    ),
    *("[]", "[[1]]", "{}", "{a: {b: [c]}}", "../..", "/etc/passwd", "=", "<<", "--model", "[--model, x]"),
]
DTYPES = ["BOOL", "U8", "I64", "F16", "F64", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64"]
DEEP: Any = 1
for _ in range(150):
    DEEP = [DEEP]
INSTEAD: list[Any] = [
    *(None, True, -1, 0, 1, 2**62, 10**400, -1.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "..", "../../precious.txt", "/etc/passwd", "a\0b", "x" * 5000, "\u202e", "en", "nf4", "nan"),
    *(
        [],
        {},
        [None],
        [[]],
        [0] * 50,
        ["en", "en"],
        {"": None},
        {"..": {}},
        {"file": "..", "sha256": ""},
        DEEP,
    ),
]


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value; of long lists the first two."""
    yield path
    if isinstance(value, dict):
        for name, each in value.items():
            yield from keys(each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value[:2]):
            yield from keys(each, (*path, index))


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def without(value: Any, path: Sequence[Any]) -> Any:
    copy = value.copy()
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], path[1:])
    return copy


def damaged_json(content: bytes) -> Iterator[Damage]:
    """Every key exchanged for everything in INSTEAD, left out, and renamed."""
    value = json.loads(content)
    for path in keys(value):
        for new in INSTEAD:
            yield lambda path=path, new=new: json.dumps(changed(value, path, new)).encode()
        if path:
            yield lambda path=path: json.dumps(without(value, path)).encode()
        if path and isinstance(path[-1], str):
            other = {f"{path[-1]}\u200b": 1, "..": 2}
            yield lambda path=path, other=other: json.dumps(changed(value, path[:-1], other)).encode()


def damaged_bytes(content: bytes, random: Random) -> Iterator[Damage]:
    """Cut off, flipped, overwritten, put in twice, replaced."""
    for whole in (b"", b"\0", b"\xff\xfe" + content, b"\xef\xbb\xbf" + content, b"[" * 100_000, content * 2):
        yield lambda whole=whole: whole
    for _ in range(200):
        at, noise = random.randrange(len(content)), random.randbytes(random.randrange(1, 40))
        yield lambda at=at: content[:at]
        yield lambda at=at, noise=noise: content[:at] + noise + content[at:]
        yield lambda at=at, noise=noise: content[:at] + noise + content[at + len(noise) :]
        yield (
            lambda at=at, noise=noise: (
                content[:at] + bytes([content[at] ^ 1 << noise[0] % 8]) + content[at + 1 :]
            )
        )
        yield lambda noise=noise: noise


def damaged_tensors(content: bytes, random: Random) -> Iterator[Damage]:
    """Headers that lie about names, types, shapes and places, and headers of a length that lies."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    for each in damaged_json(header):
        yield lambda each=each: len(each()).to_bytes(8, "little") + each() + data
    for lie in (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1):
        yield lambda lie=lie: lie.to_bytes(8, "little") + header + data
    names = [name for name in json.loads(header) if name != "__metadata__"]
    for _ in range(200):
        other = json.loads(header)
        entry = other[random.choice(names)]
        entry["dtype"] = random.choice(DTYPES)
        entry["shape"] = random.choice([[], [0], [0, 2**62, 2**62], [2**63], [1] * 70, entry["shape"][::-1]])
        entry["data_offsets"] = random.choice([[0, 0], entry["data_offsets"], [0, 2**63], [5, 1]])
        again = json.dumps(other).encode()
        yield lambda again=again: len(again).to_bytes(8, "little") + again + data


def damaged_yaml(content: bytes) -> Iterator[Damage]:
    """Every field with values that are no value of it, and what YAML can do beyond JSON."""
    lines = content.decode().splitlines()
    for index, line in enumerate(lines):
        name = line.partition(":")[0]
        for new in YAML:
            other = [*lines[:index], f"{name}: {new}", *lines[index + 1 :]]
            yield lambda other=other: "\n".join(other).encode()
    bomb = "\n".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 'x'}]" for k in range(30))
    for whole in (
        bomb,
        "a: &a [*a]",
        "a: " + "[" * 5000,
        "- " * 5000 + "x",
        "? [a]\n: b",
        "<<: x",
        "--- a\n--- b",
        "null",
    ):
        yield lambda whole=whole: whole.encode()


def reseal(folder: Path) -> None:
    """Make the checksums of a folder's cards fit its tensor files, as whoever tampers would."""
    for name, field in (("language_space.json", "tensors"), ("shifcon.json", "files")):
        if not (folder / name).is_file():
            continue
        card = json.loads((folder / name).read_text())
        if field == "tensors":
            card[field]["sha256"] = sha256_file(folder / card[field]["file"])
        else:
            card[field] = {file: sha256_file(folder / file) for file in card[field]}
        (folder / name).write_text(json.dumps(card))


# --- what reads them ----------------------------------------------------------------------------------------------


def resume(world: World, folder: Path) -> None:
    for checkpoint in list_checkpoints(folder.parent):
        check_same_run(checkpoint, world.handle, {})
        load_vectors(checkpoint, world.vectors)


READERS: dict[str, tuple[str, Callable[[World, Path], object]]] = {
    "space": ("space/language_space.json", lambda world, folder: LanguageSpace.load(folder)),
    "space tensors": ("space/language_space.safetensors", lambda world, folder: LanguageSpace.load(folder)),
    "area": ("space/area.json", lambda world, folder: read_folder(folder)),
    "run": ("run/shifcon.json", lambda world, folder: read_card(folder)),
    "log": (
        "run/training_log.json",
        lambda world, folder: read_folder(folder),
    ),
    "evaluation": ("run/evaluation.json", lambda world, folder: EvaluationResult.load(folder)),
    "comparison": (
        "run/comparison.json",
        lambda world, folder: PairedComparison.load(folder / "comparison.json"),
    ),
    "systems": ("systems.json", lambda world, folder: SystemComparison.load(folder / "systems.json")),
    "shift": ("run/shift.safetensors", lambda world, folder: read_shift(folder, read_card(folder))),
    "checkpoint": ("run/checkpoint-3/shifcon.json", resume),
    "trainer state": ("run/checkpoint-3/trainer_state.json", resume),
    "vectors": ("run/checkpoint-3/language_vectors.safetensors", resume),
    "yaml": ("run.yaml", lambda world, folder: parse_config(folder / "run.yaml")),
}


def attempt(world: World, file: Path, content: bytes, read: Callable[[World, Path], object]) -> str:
    """Read a damaged file: ``"read"``, ``"refused"`` by its name, or else what went wrong."""
    original = file.read_bytes()
    sealed = {card: card.read_bytes() for card in file.parent.glob("*.json")}
    try:
        file.write_bytes(content)
        if file.suffix == ".safetensors":
            reseal(file.parent)
        before = state_of(world.root.parent)
        try:
            read(world, file.parent)
            outcome = "read"
        except ValueError as error:
            # What is wrong with tensors may be said of the card that says what they should be.
            names = [file.name, *(card.name for card in sealed if file.suffix == ".safetensors")]
            named = any(name in str(error) for name in names)
            outcome = "refused" if named else f"the error does not name the file: {error!r:.300}"
        except BaseException as error:
            outcome = f"{error!r:.300}"
        return outcome if state_of(world.root.parent) == before else "something was changed by reading"
    finally:
        for card, was in sealed.items():
            card.write_bytes(was)
        file.write_bytes(original)


ATTEMPTS = int(os.environ.get("SHIFCON_FUZZ", "120"))  # for each file, out of thousands


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_by_name_and_nothing_is_touched(world: World, name: str) -> None:
    relative, read = READERS[name]
    file, random = world.root / relative, Random(SEED)
    content = file.read_bytes()
    assert attempt(world, file, content, read) == "read"
    damages = list(damaged_bytes(content, random))
    random.shuffle(damages)
    special: dict[str, Callable[[], Iterator[Damage]]] = {
        ".json": lambda: damaged_json(content),
        ".safetensors": lambda: damaged_tensors(content, random),
        ".yaml": lambda: damaged_yaml(content),
    }
    made = list(special[file.suffix]())
    random.shuffle(made)
    outcomes: dict[str, list[bytes]] = {}
    for damage in [*damages[: ATTEMPTS // 3], *made[:ATTEMPTS]]:
        outcomes.setdefault(attempt(world, file, damage(), read), []).append(damage())
    problems = outcomes.keys() - {"read", "refused"}
    assert not problems, "\n".join(f"{what}\n    {outcomes[what][0][:2000]!r}" for what in problems)
    assert len(outcomes["refused"]) > ATTEMPTS / 4
    assert attempt(world, file, content, read) == "read"


LEFTOVERS: list[dict[str, Any]] = [
    {"staging": "..", "files": []},
    {"staging": "../..", "files": ["precious.txt"]},
    {"staging": "/", "files": ["/etc/passwd"]},
    {"staging": ".saving-shifcon.json", "files": ["shifcon.json", "../precious.txt"]},
]


@pytest.mark.parametrize("record", LEFTOVERS)
def test_leftovers_of_writers_are_not_acted_on(world: World, tmp_path: Path, record: dict[str, Any]) -> None:
    """A record that an older release wrote, and staging folders, in a folder that someone was sent."""
    around = tmp_path / "around"
    shutil.copytree(world.root, around / "root")
    (around / "precious.txt").write_text("mine")
    run = around / "root" / "run"
    for folder in (run, run / "checkpoint-3", around / "root" / "space"):
        (folder / ".commit.json").write_text(json.dumps(record))
        (folder / ".staging-1").mkdir()
        (folder / ".saving-evaluation.json").symlink_to(around)
        (folder / ".saving-shifcon.json").mkdir()
        (folder / ".saving-shifcon.json" / "shifcon.json").write_text("{}")
    (run / "checkpoint-9").symlink_to(around)
    before = state_of(around)
    read_card(run)
    read_shift(run, read_card(run))
    LanguageSpace.load(around / "root" / "space")
    EvaluationResult.load(run)
    read_folder(run)
    assert list_checkpoints(run) == [run / "checkpoint-3"]
    check_same_run(run / "checkpoint-3", world.handle, {})
    if record is LEFTOVERS[1]:  # takes seconds
        sf.load(run, base=world.base)
        report_folder(run, tmp_path / "pages")
    assert state_of(around) == before


ADAPTER: list[tuple[str, Any]] = [
    *(
        (key, new)
        for key in ("peft_type", "r", "target_modules", "lora_alpha", "task_type")
        for new in (None, DEEP, -1, "..")
    ),
    *(
        ("auto_mapping", {"base_model_class": "system", "parent_library": "os"}),
        ("no_such_key", 1),
        ("r", 2**62),
    ),
    *(("rank_pattern", {"(": 1}), ("modules_to_save", ["lm_head"]), ("layers_to_transform", [99])),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(3))
def test_an_adapter_that_lies_is_refused_by_name(world: World, part: int) -> None:
    def load(world: World, folder: Path) -> object:
        return sf.load(folder, base=world.base)

    config = world.root / "run" / "adapter_config.json"
    whole = json.loads(config.read_text())
    damages = [json.dumps({**whole, key: new}).encode() for key, new in ADAPTER]
    damages += [b"", b"[]", b"\xff", json.dumps({"peft_type": "LORA"}).encode()]
    outcomes = {each: attempt(world, config, each, load) for each in damages[part::3]}
    problems = {what: each for each, what in outcomes.items() if what not in ("read", "refused")}
    assert not problems
    assert "refused" in outcomes.values()
    if part == 0:
        assert attempt(world, config, config.read_bytes(), load) == "read"
