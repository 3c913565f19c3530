"""Methods as starts and objectives: their names, needs and options, and methods of other packages."""

import dataclasses
import re
import sys

import pytest
from helpers import make_task, read_weights, write_adaptation

from regraft import Distillation, Recipe, Upgrade, recycle
from regraft.errors import OutcomeError, RecipeError
from regraft.methods import Method, Objective, Part, Start, find_method, methods, parse_options, parts, registry
from regraft.methods.masked import Masking
from regraft.methods.ridge import Ridge
from regraft.methods.scaled import Scaling
from regraft.methods.trimmed import Trimming

RECIPE = Recipe(steps=2, batch_size=8, learning_rate=1e-3, precision="fp32")
OPTIONS_OF_0_1 = {  # the options that outcomes record
    "init": None,
    "ridge+init": dataclasses.asdict(Ridge()),
    "ridge+distill": {
        "alpha": 0.7,
        "beta": 1.0,
        "temperature": 5.0,
        "kl_reduction": "batchmean",
        "flip_weight": 0.0,
        "decay": "none",
    },
}
CLASSIFICATION = make_task("train.csv")


def expand_formula(name: str) -> str:
    """Return the start and the objective of a method, joined by a plus."""
    return "+".join(part.name for part in find_method(name).parts)


def test_named_methods_are_starts_and_objectives():
    for name, expanded in {
        "scratch": "scratch+labels",
        "init": "direct+labels",
        "distill": "scratch+distill",
        "init+distill": "direct+distill",
        "ridge+init": "ridge+labels",
    }.items():
        assert expand_formula(name) == expand_formula(expanded) == expanded
    for name in ("anchored", "interpolation", "label-free"):
        assert expand_formula(name) == f"direct+{name}"
    assert expand_formula("ridge") == "ridge"
    for name in (f"{start}+{objective}" for start in parts(Start) for objective in parts(Objective)):
        assert expand_formula(name) == name
        assert "training" in find_method(name).needs()
    assert len(methods()) == 20


@pytest.mark.parametrize(
    ("misspelt", "suggestion"),
    [("ridge+distil", "ridge+distill"), ("rigde", "ridge"), ("trimmed+label", "trimmed+labels")],
)
def test_an_unknown_method_is_refused_with_a_suggestion(misspelt, suggestion):
    with pytest.raises(RecipeError, match=re.escape(f"Did you mean {suggestion!r}?")):
        find_method(misspelt)


def test_needs_and_heads_of_a_method_depend_on_its_options():
    assert find_method("masked").needs() == find_method("scaled").needs(Scaling(labels=8)) == ("labels",)
    assert find_method("masked").needs(Masking(labels=0)) == find_method("scaled").needs() == ("text",)
    assert find_method("masked+label-free").needs(Masking(labels=0)) == ("text", "training")
    assert find_method("ridge+labels").needs() == ("labels", "training")
    assert find_method("project+label-free").needs() == ("text", "tasks", "training")
    assert find_method("scaled").heads() == find_method("ridge+distill").heads() == ("copy",)
    assert find_method("scaled").heads(Scaling(scale=1.0)) == find_method("trimmed+labels").heads()
    assert len(find_method("anchored").heads()) == 3


def test_options_belong_to_a_start_or_an_objective():
    assert parse_options("ridge+distill", ["alpha=0.9"]) == (Ridge(), Distillation(alpha=0.9))
    all_options = parse_options("ridge+distill", ["distill.alpha=0.9", "ridge.ridge=0.1", "texts=8"])
    assert all_options == (Ridge(ridge=0.1, texts=8), Distillation(alpha=0.9))
    assert parse_options("init+distill", ["distill.alpha=0.9"]) == Distillation(alpha=0.9)
    for name, options in OPTIONS_OF_0_1.items():
        method = find_method(name)
        assert method.record(method.for_task(None, CLASSIFICATION)) == options
    distilled = find_method("ridge+distill")
    recorded = {**OPTIONS_OF_0_1["ridge+distill"], "alpha": 0.9, "ridge.ridge": 0.1, "ridge.texts": 8}
    assert distilled.record(distilled.for_task(all_options, CLASSIFICATION)) == recorded
    reverse = distilled.for_task(Distillation(divergence="reverse"), CLASSIFICATION)
    assert distilled.record(reverse) == {**OPTIONS_OF_0_1["ridge+distill"], "divergence": "reverse"}
    assert parse_options("ridge", ["texts=8.0"]) == Ridge(texts=8)


def test_options_of_a_wrong_type_or_name_are_refused():
    for name, option, message in (
        ("ridge", "texts=2.7", "must be of type int"),
        ("auto", "budgets=[true]", r"must be of type tuple\[float, \.\.\.\]"),
        ("init+distill", "direct.alpha=0.9", r"has no option 'direct\.alpha'"),
        ("init+distill", "alfa=1", "Did you mean 'alpha'"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_options(name, [option])
    for options in (Trimming(), (Distillation(), Distillation()), "alpha=0.9"):
        with pytest.raises(RecipeError, match="takes Ridge and Distillation"):
            find_method("ridge+distill").complete(options)


def test_an_option_of_both_parts_is_qualified(monkeypatch):
    method = Method("twice", "", (Part("first", print, Ridge), Part("second", print, Ridge)))
    monkeypatch.setattr("regraft.methods.options.find_method", lambda name: method)
    with pytest.raises(RecipeError, match=r"use first\.texts or second\.texts"):
        parse_options("twice", ["texts=8"])
    assert parse_options("twice", ["second.texts=8"]) == (Ridge(), Ridge(texts=8))


def make_options(annotation, default):
    """Make a dataclass with one option."""
    return dataclasses.make_dataclass("Options", [("option", annotation, default)])


def test_options_that_no_text_can_express_are_refused():
    for annotation in ("bool", "int | None", "tuple[float, ...]", str):
        Part("part", print, make_options(annotation, None))
    for annotation in (list[int], "dict[str, int]", "int | str", "Optional[int]"):
        with pytest.raises(RecipeError, match=r"part: its option option is of type .* Declare it as bool, int"):
            Part("part", print, make_options(annotation, None))
    with pytest.raises(RecipeError, match="its option option needs a default"):
        Part("part", print, make_options("int", dataclasses.field()))
    for options in (dict, Ridge()):
        with pytest.raises(RecipeError, match="its options must be a dataclass"):
            Part("part", print, options)


def test_a_start_and_an_objective_are_run_with_their_options(tmp_path, opened_bases, task_file):
    upgrade = Upgrade(*opened_bases["bert"])
    source = write_adaptation(upgrade.old, "lora", tmp_path / "old")
    masking, distillation = Masking(labels=3), Distillation(alpha=0.9)
    options = (masking, distillation)
    tuned = recycle(upgrade, source, task_file, "masked+distill", tmp_path / "out", recipe=RECIPE, options=options)
    record = tuned.record
    assert record.method == "masked+distill"
    assert record.inputs["options"] == {**OPTIONS_OF_0_1["ridge+distill"], "alpha": 0.9, "masked.labels": 3}
    assert 16 <= record.cost.labels <= 16 + 6  # two batches of 8, and three examples per class
    start = recycle(upgrade, source, task_file, "masked", tmp_path / "start", recipe=RECIPE, options=masking)
    assert start.record.cost.labels == 6
    assert tuned.curve[0]["score"] == start.record.scores.dev
    assert read_weights(tuned.path / "adaptation").keys() == read_weights(start.path / "adaptation").keys()
    with pytest.raises(OutcomeError, match="options"):
        recycle(upgrade, source, task_file, "masked+distill", tmp_path / "out", recipe=RECIPE, options=distillation)


PLUGIN = """
import dataclasses

from regraft.methods import Objective, Start
from regraft.weights import trim


@dataclasses.dataclass(frozen=True)
class Halving:
    share: float = 0.5


def run(job, options):
    job.graft_transformed(lambda name, delta, shift: options.share * delta)


HALVED = Start("halved", run, Halving, summary="scale the old delta by a share")
LONGER = Objective("longer", lambda job, model, options: job.tune(model), summary="tune", needs=("labels", "training"))
"""


@pytest.fixture
def install_package(tmp_path, monkeypatch):
    """A function that puts a distribution with entry points and a module on the path, as an installer does."""

    def write_distribution(name: str, entry_points: str, module: str = PLUGIN) -> None:
        folder = tmp_path / name
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[regraft.methods]\n{entry_points}\n")
        (folder / f"{name}_code.py").write_text(module)
        monkeypatch.syspath_prepend(folder)
        clear_caches()

    def clear_caches() -> None:
        for cached_function in (registry.methods, registry._registry, registry._load):
            cached_function.cache_clear()

    yield write_distribution
    monkeypatch.undo()
    for module in ("other_code", "bad_code"):
        sys.modules.pop(module, None)
    clear_caches()


def test_methods_of_other_packages_are_listed_and_run(tmp_path, opened_bases, task_file, install_package, run_main):

    install_package("other", "halved = other_code:HALVED\nlonger = other_code:LONGER")
    assert expand_formula("ridge+distill") == "ridge+distill"
    assert "other_code" not in sys.modules  # imported only when it is looked up
    assert list(methods())[20:] == ["halved", "longer"]
    assert expand_formula("longer") == "direct+longer"
    assert expand_formula("halved+distill") == "halved+distill"
    upgrade = Upgrade(*opened_bases["bert"])
    source = write_adaptation(upgrade.old, "full", tmp_path / "old")
    command = ["recycle", "--old-base", upgrade.old.path, "--new-base", upgrade.new.path]
    command += ["--adaptation", source, "--task", task_file, "--out", tmp_path / "out"]
    command += ["--method", "halved", "-o", "share=0.25"]
    code, output, _ = run_main(*command)
    assert code == 0, output
    scaled = recycle(upgrade, source, task_file, "scaled", tmp_path / "scaled", options=Scaling(scale=0.25))
    halved, expected = (read_weights(folder / "adaptation") for folder in (tmp_path / "out", scaled.path))
    assert all(halved[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("entry_points", "module", "message"),
    [
        (
            "broken = bad_code:X",
            "import nothing_at_all",
            r"bad 1\.0: its method 'broken' .*cannot be imported.*nothing",
        ),
        ("strange = bad_code:X", "X = 3", r"bad 1\.0: .*must name a Start.*found 3"),
        ("other = bad_code:HALVED", PLUGIN, r"bad 1\.0: .*called 'other'"),
        ("direct = bad_code:HALVED", PLUGIN, r"bad 1\.0 registers a method called 'direct', but regraft has one"),
        ("init = bad_code:HALVED", PLUGIN, r"bad 1\.0 registers a method called 'init', but regraft has one"),
        ("a+b = bad_code:HALVED", PLUGIN, r"called 'a\+b', but names are of letters"),
        ("../a = bad_code:HALVED", PLUGIN, r"called '\.\./a', but names are of letters"),
        ("ending = bad_code:X", "import sys; sys.exit(3)", r"bad 1\.0: .*cannot be imported \(SystemExit: 3\)"),
    ],
)
def test_a_broken_package_is_named(install_package, entry_points, module, message):
    install_package("bad", entry_points, module)
    with pytest.raises(RecipeError, match=message):
        methods()
    if entry_points.startswith("broken"):
        assert expand_formula("ridge+distill") == "ridge+distill"  # methods of regraft itself still work
