"""Sizes, configs, stores, cells and verdicts of the experiments that reproduce the paper."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from helpers import PAPER_CONFIGS, write_sentences

from regraft.errors import DataError, MismatchError, OutcomeError

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import reproduce
from findings import experiment, store
from findings.experiment import Finding, judge_claim, judge_difference
from findings.runs import mean_dev_score, steps_to_score
from findings.settings import Size, load_yaml

PAPER = Path(reproduce.__file__).parent / "paper"


@pytest.fixture
def plan(paper_folder, tmp_path):
    return reproduce.make_plan(paper_folder / "size.yaml", tmp_path / "out", configs=paper_folder / "configs")


def test_a_store_of_a_different_size_is_refused(plan):
    store.check_size(plan.store)
    size = plan.store.size

    def resize(**changes):
        return dataclasses.replace(plan.store, size=size.model_copy(update=changes))

    with pytest.raises(OutcomeError, match="different values of max_length"):
        reproduce.build_missing(dataclasses.replace(plan, store=resize(max_length=12)), 0)
    with pytest.raises(OutcomeError, match=r"tuning\.full"):
        store.check_size(resize(tuning={"full": size.tuning["full"].model_copy(update={"steps": 9})}))
    with pytest.raises(OutcomeError, match="different values of domains"):
        store.check_size(resize(domains=size.domains[::-1]))
    store.check_size(resize(seeds=(20, 30, 40), domains=(*size.domains, size.domains[0])))


def test_a_cell_is_measured_again_if_its_config_changes(paper_folder, plan):
    selected = reproduce.make_plan(
        paper_folder / "size.yaml", plan.store.out, ["2"], configs=paper_folder / "configs"
    ).selected
    ((connectivity, config),) = selected
    cells = connectivity.list_cells(plan.store, config)

    def measure_nothing(store, work_folder, *arguments):
        return {}

    for cell in cells:
        trivial_cell = dataclasses.replace(cell, measure=measure_nothing)
        experiment.measure_cell(plan.store, trivial_cell, connectivity.cell_file(plan.store, cell))
    assert connectivity.missing_cells(plan.store, config) == []
    finer_config = config.model_copy(update={"points": 5})
    assert len(connectivity.missing_cells(plan.store, finer_config)) == len(cells) == 8


@pytest.mark.parametrize("name", ["machine", "paper"])
def test_published_configs_fit_their_size(name):
    plan = reproduce.make_plan(PAPER / f"{name}.yaml", Path("nowhere"))
    size = plan.store.size
    assert size.seeds == (20, 30, 40)
    assert plan.store.num_bases == 5
    assert {task.domain for task in size.tasks.values()} <= {domain.name for domain in size.domains}
    assert len(plan.selected) == 7
    for selected, config in plan.selected:
        tunings = list(selected.list_tunings(config, size.seeds, plan.store.num_bases))
        assert {tuning.task for tuning in tunings} <= size.tasks.keys()
        assert {tuning.kind for tuning in tunings} <= size.tuning.keys() & size.few_shot.keys()
        assert max((tuning.base for tuning in tunings), default=0) < plan.store.num_bases
        cells = selected.list_cells(plan.store, config)
        assert len({cell.name for cell in cells}) == len(cells) > 0
        json.dumps([cell.arguments for cell in cells])
    assert set(PAPER_CONFIGS) == {path.parent.name for path in PAPER.glob("*/config.yaml")}


def test_the_size_of_the_paper_loads_with_local_stand_ins(tmp_path, bases, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = yaml.safe_load((PAPER / "paper.yaml").read_text(encoding="utf-8"))
    settings["base"] = str(bases["bert"][0])
    for domain in settings["domains"]:
        domain["sources"] = [write_corpus_stand_in(tmp_path / domain["sources"][0], domain["column"])]
        domain["characters"] = 500
    for source in settings["tasks"].values():
        task = source["task"]
        task_folder = write_task_stand_in(tmp_path / task["train"]["dataset"], task)
        for split in {"train", "dev", "test"} & task.keys():
            task[split]["dataset"] = task_folder
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(settings))
    paper = store.Store(tmp_path / "out", load_yaml(Size, tmp_path / "paper.yaml"))
    store.write_inputs(paper)
    for name in paper.size.tasks:
        data = paper.load_data(name, 20)
        assert len(data.labels) == 2
        assert len(data.test) == 40
        assert data.max_length == 128
        is_dev_split_off = "dev" not in settings["tasks"][name]["task"]
        assert (len(data.train), len(data.dev)) == ((36, 4) if is_dev_split_off else (40, 40))
    for domain in paper.size.domains:
        lines = store.corpus_file(paper, domain).read_text(encoding="utf-8").splitlines()
        lengths = [len(json.loads(line)["text"]) for line in lines]
        assert sum(lengths[:-1]) < 500 <= sum(lengths)
    assert paper.recipe("full", 20, 2).epochs == 10
    assert paper.recipe("full", 20, 2).seed == 22
    assert paper.recipe("bottleneck", 20, 0, few_labels=True).batch_size == 2


def write_corpus_stand_in(folder, column):
    """Write 200 texts to a folder in the layout of a data set of the hub, and return the folder's path."""
    folder.mkdir(parents=True)
    rows = [json.dumps({column: f"text {index} of {folder.name}"}) for index in range(200)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return str(folder)


def write_task_stand_in(folder, task):
    """Write 40 examples per split to a folder in the layout of a data set of the hub, and return the folder's path."""
    folder.mkdir(parents=True)
    splits = dict.fromkeys(task[name]["split"] for name in ("train", "dev", "test") if name in task)
    for seed, split in enumerate(splits):
        write_sentences(folder / f"{split}.csv", 40, seed)
        _, *rows = (folder / f"{split}.csv").read_text().splitlines()
        (folder / f"{split}.csv").write_text("\n".join([f"{task['text']},{task['label']}", *rows]) + "\n")
    config_name = task["train"].get("config")
    if config_name:
        data_files = [{"split": split, "path": f"{split}.csv"} for split in splits]
        front_matter = yaml.safe_dump({"configs": [{"config_name": config_name, "data_files": data_files}]})
        (folder / "README.md").write_text(f"---\n{front_matter}---\n")
    return str(folder)


TASK_WITHOUT_TEST = {"name": "mood", "train": "a.csv", "text": "t", "label": "l"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretraining": {"stepps": 3}}, "unknown key 'pretraining.stepps'.*Did you mean 'steps'"),
        ({"seeds": [20]}, "the key 'seeds' is"),
        ({"domains": [{"name": "a", "characters": 5}]}, "needs either `demo` or `sources`"),
        ({"tasks": {"mood": {"domain": "first"}}}, "needs either `demo` or `task`"),
        ({"tasks": {"mood": {"domain": "first", "task": TASK_WITHOUT_TEST}}}, "of task mood needs a `test`"),
        ({"max_length": "long"}, "the key 'max_length' is 'long'. Set it to a whole number of tokens"),
    ],
)
def test_an_invalid_size_is_refused(tmp_path, paper_folder, changes, message):
    settings = yaml.safe_load((paper_folder / "size.yaml").read_text()) | changes
    (tmp_path / "size.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(DataError, match=message):
        load_yaml(Size, tmp_path / "size.yaml")


def test_experiments_are_selected_by_folder_number_or_word(paper_folder):
    def select_experiments(*names):
        return reproduce.make_plan(
            paper_folder / "size.yaml", paper_folder / "nowhere", names, configs=paper_folder / "configs"
        ).selected

    with pytest.raises(DataError, match=r"no experiment 'similarty'.*3-similarity"):
        select_experiments("similarty")
    selected = select_experiments("7", "similarity", "1-compatibility")
    assert [selected_experiment.name for selected_experiment, _ in selected] == [
        "7-chain",
        "3-similarity",
        "1-compatibility",
    ]


def test_a_record_is_read_for_the_same_arguments_alone(tmp_path, plan):
    def measure(store, work_folder, number):
        work_folder.mkdir()
        return {"number": number}

    cell = experiment.Cell("three", measure, (3,))
    file = tmp_path / "1-x" / "three.json"
    assert experiment.read_record(file, cell) is None
    assert experiment.measure_cell(plan.store, cell, file) == "made"
    assert experiment.read_record(file, cell).figures == {"number": 3}
    assert not file.with_suffix("").exists()
    assert experiment.read_record(file, dataclasses.replace(cell, arguments=(4,))) is None
    shutil.rmtree(file.parent)


def test_a_refusal_is_recorded_and_not_tried_again(plan):
    def refuse(store, work_folder):
        raise MismatchError("it changes nothing")

    def measure(store, work_folder):
        return {"score": 1}

    cells = [
        experiment.Cell("refused", refuse, ()),
        experiment.Cell("measured", measure, ()),
    ]
    two_cells = dataclasses.replace(reproduce.list_experiments()[0], list_cells=lambda store, config: cells)
    reports = [experiment.measure_cell(plan.store, cell, two_cells.cell_file(plan.store, cell)) for cell in cells]
    assert reports == ["refused: it changes nothing", "made"]
    assert two_cells.missing_cells(plan.store, None) == []
    assert two_cells.read_refusals(plan.store, None) == {"refused": "it changes nothing"}
    assert [record.figures for record in two_cells.read_records(plan.store, None)] == [{"score": 1}]


def test_verdicts_depend_on_the_share_of_cells_that_agree():
    finding = judge_claim("claim", "part", [True] * 9 + [False], "figure")
    assert finding == Finding("claim", "holds", "in 9 of 10 cells; figure", "part")
    assert judge_claim("claim", "part", [True] * 8 + [False] * 2, "figure").verdict == "mixed"
    assert judge_claim("claim", "part", [True] + [False] * 9, "figure").verdict == "does not hold"
    assert judge_claim("claim", "part", [], "figure").verdict == "not measured"


def test_verdicts_on_differences_depend_on_the_shares_of_better_and_worse_cells():
    better, even, worse = (
        {"estimate": estimate, "low": estimate - 0.02, "high": estimate + 0.02} for estimate in (0.03, 0.0, -0.03)
    )
    for differences, verdict in (
        ([better, even], "holds"),
        ([better, worse], "mixed"),
        ([better, even, even], "mixed"),
        ([even, worse], "does not hold"),
    ):
        assert judge_difference("claim", "part", differences).verdict == verdict
    finding = judge_difference("claim", "part", [better, better, worse])
    assert finding.figure == "+1.0 points on average; better in 2 and worse in 1 of 3 cells"


def test_mean_dev_score_and_steps_to_score_equal_values_by_hand():
    run = {"curve": [[0, 0.5], [10, 0.7], [30, 0.9]]}
    assert mean_dev_score(run) == pytest.approx((10 * 0.6 + 20 * 0.8) / 30)
    assert steps_to_score(run, 0.7) == 10
    assert steps_to_score(run, 0.95) is None
