"""Experiments: what is refused when one is loaded, and that each runs at its smallest scale."""

import json
import textwrap

import pytest

from normlab import experiment as experiments
from normlab.cli import main
from normlab.errors import UserError
from normlab.experiment import experiment_files, load_experiment
from normlab.sweep import make_plan

TINY = {"model.widths": "(4,)", "train.num_steps": "4", "probe.layer": "none"}

SOURCE = """
from normlab.experiment import *

EXPERIMENT = Experiment(
    claim="Normalizers change what a small net learns.",
    paper=Published(
        metric="test_accuracy", rows={rows}, setting="digits", source="nowhere", scales=("smoke",)
    ),
    scales={{"smoke": Scale("configs/digits.py", {fields})}},
    sweep={sweep},
    seeds=2,
    verdict={verdict},
    interval={interval},
)
"""
SMALL = {
    "model.widths": (4,),
    "model.strides": (2,),
    "train.num_steps": 4,
    "eval.every_steps": 2,
}


@pytest.fixture
def write(tmp_path):
    def make(
        rows="{'none': 98.0}",
        fields=SMALL,
        sweep="grid({'norm': ['none', 'layer_norm']})",
        verdict="all_of(above('layer_norm', 'none'))",
        interval="'t'",
    ):
        path = tmp_path / "an_experiment.py"
        path.write_text(
            textwrap.dedent(SOURCE).format(
                rows=rows, fields=fields, sweep=sweep, verdict=verdict, interval=interval
            )
        )
        return str(path)

    return make


def names():
    return [file.stem for file in experiment_files()]


@pytest.mark.parametrize("name", names())
def test_every_scale_of_every_experiment_makes_a_plan(name, monkeypatch):
    """Every config is built, every override exists, and no run is computed."""
    monkeypatch.setattr("normlab.training.setup.check_source", lambda config: None)
    _, experiment = load_experiment(name)
    for scale_name in experiment.scales:
        scale = experiment.at(scale_name)
        plan = make_plan(scale.config, scale.sweep, seeds=range(2), overrides=scale.overrides)
        assert len(plan.runs) == 2 * len(scale.sweep)
        json.dumps(experiment.facts(name, scale_name))


@pytest.mark.parametrize("name", names())
def test_every_experiment_runs_at_smoke_scale(name, tmp_path, capsys):
    """Of a few steps: its runs end, its verdict is given, its page is written."""
    command = ["sweep", name, "--seeds=2", f"--workdir={tmp_path / 'sweep'}"]
    fields = ["--config.train.num_steps=10", "--config.eval.every_steps=5"]
    assert main([*command, *fields]) == 0
    verdict = json.loads((tmp_path / "sweep" / "verdict.json").read_text())
    assert verdict["outcome"] in ("reproduced", "not reproduced", "underpowered")
    assert "report.html" in capsys.readouterr().out


def test_an_experiment_is_found_by_its_name_or_its_file(write):
    assert load_experiment(write())[0] == "an_experiment"
    assert load_experiment(names()[0])[0] == names()[0]
    assert load_experiment(f"experiments/{names()[0]}.py")[0] == names()[0]
    with pytest.raises(UserError, match="did you mean 'batch_norm_mnist'"):
        load_experiment("batch_norm_mnits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "{'nine': 98.0}"}, "published row 'nine' is in no sweep; did you mean 'none'"),
        ({"rows": "{'none': {32: 98.0}}"}, "published row 'none' has 32, which no sweep has"),
        ({"rows": "{'none': 980.0}"}, "published 980.0 of 'none' is no percentage"),
        ({"sweep": "grid({'norm': []})"}, "a grid gives 'norm' no value"),
        ({"interval": "'bootstrp'"}, "unknown interval 'bootstrp'; did you mean 'bootstrap'"),
        ({"interval": "95"}, "unknown interval '95'; one of t, bootstrap"),
        ({"sweep": "nothing"}, "does not load: name 'nothing' is not defined"),
        ({"sweep": "grid({'norm': ['none']}"}, "does not load"),
    ],
)
def test_a_mistake_in_a_declaration_is_one_line(write, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(write(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sweep": "grid({'norm': ['none'], 'optim.lr': [1]})"}, [], "'optim.lr'"),
        ({"sweep": "grid({'norm': ['nune']})", "rows": "{}"}, [], "did you mean 'none'"),
        ({}, ["--scale=paper"], "unknown scale 'paper'; one of smoke"),
        ({}, ["--seeds=0"], "--seeds=0 must be 1 or more"),
        ({}, ["--config.seed=1"], "seed=1 is set"),
        (
            {"sweep": "grid({'norm': ['none'], 'optim.base_lr': [0.1]})"},
            ["--config.optim.base_lr=1.0"],
            "the sweep sets 'optim.base_lr' itself",
        ),
        (
            {"sweep": "grid({'norm': ['none']}) * tune({'optim.base_lr': [0.1, 0.5]})"},
            [],
            "data.num_validation is 0",
        ),
    ],
)
def test_a_mistake_in_a_sweep_ends_it_before_any_run(
    write, tmp_path, capsys, change, arguments, message
):
    folder = tmp_path / "sweep"
    assert main(["sweep", write(**change), f"--workdir={folder}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(folder.glob("*/config.json"))


def test_a_verdict_that_raises_is_told_after_the_runs_are_done(write, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(["sweep", write(verdict="lambda sweep: 1 / 0"), f"--workdir={folder}"]) == 0
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert "No verdict." in (folder / "report.md").read_text()


def test_the_declared_interval_is_that_of_verdict_and_report(write, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(["sweep", write(interval="'bootstrap'"), f"--workdir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "95% BCa bootstrap interval" in out
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["interval"] == "bootstrap"
    assert "two-sided BCa bootstrap intervals" in verdict["test"]
    # Declared anew with the other kind, the same runs are judged by it.
    assert main(["sweep", write(), f"--workdir={folder}"]) == 0
    assert json.loads((folder / "verdict.json").read_text())["interval"] == "t"
    assert "two-sided t intervals" in (folder / "report.md").read_text()


def test_another_experiments_folder_is_refused(write, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(["sweep", write(), f"--workdir={folder}"]) == 0
    other = write().replace("an_experiment", "another")
    (tmp_path / "another.py").write_text((tmp_path / "an_experiment.py").read_text())
    before = (folder / "sweep.json").read_bytes()
    assert main(["sweep", other, f"--workdir={folder}"]) == 2
    assert "'an_experiment'" in capsys.readouterr().err
    assert (folder / "sweep.json").read_bytes() == before


def test_the_same_command_runs_nothing_again(write, tmp_path, capsys):
    folder = tmp_path / "sweep"
    command = ["sweep", write(), f"--workdir={folder}"]
    assert main(command) == 0
    report = (folder / "report.html").read_bytes()
    assert "[4/4]" in capsys.readouterr().out
    assert main(command) == 0
    assert "[4/4]" not in capsys.readouterr().out
    assert (folder / "report.html").read_bytes() == report


def test_a_rate_is_chosen_for_each_normalizer_on_validation_data(write, tmp_path):
    fields = SMALL | {"data.num_validation": 137}
    rates = "grid({'norm': ['none', 'layer_norm']}) * tune({'optim.base_lr': [0.001, 0.05]})"
    folder = tmp_path / "sweep"
    assert main(["sweep", write(fields=fields, sweep=rates), f"--workdir={folder}"]) == 0
    plan = json.loads((folder / "sweep.json").read_text())
    # 2 normalizers · 2 rates · 2 seeds
    assert len({entry["id"] for entry in plan["runs"]}) == 8
    assert "Chosen on the validation split" in (folder / "report.md").read_text()


def test_the_public_names_are_there():
    for name in experiments.__all__:
        assert hasattr(experiments, name)


def test_a_papers_page_is_kept_beside_the_experiments(tmp_path, capsys):
    tiny = ["--config.train.num_steps=10", "--config.eval.every_steps=5", "--seeds=2"]
    folders = [f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'kept'}"]
    assert main(["paper", "batch_norm_mnist", *tiny, *folders]) == 0
    page = tmp_path / "kept" / "batch_norm_mnist-smoke" / "report.md"
    assert str(page) in capsys.readouterr().out
    assert "## Figures" in page.read_text()
    assert main(["paper", f"--results={tmp_path / 'kept'}"]) == 0
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) == sum(len(load_experiment(x)[1].scales) for x in names())
    assert "not run" in listed


def test_the_readme_of_the_experiments_is_what_their_results_say():
    from normlab.cli import paper
    from normlab.report.results import overview

    folder = experiments.experiments_folder()
    kept = (folder / "README.md").read_text(encoding="utf-8")
    assert kept == overview(paper._lines(), folder / "results")
