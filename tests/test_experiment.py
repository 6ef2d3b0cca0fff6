"""Experiments: what is refused when one is loaded, and that each runs at its smallest scale."""

import errno
import json
import re
import textwrap

import pytest

from normlab import experiment as experiments
from normlab.cli import main
from normlab.errors import UserError
from normlab.experiment import check_verdict, experiment_files, load_experiment
from normlab.report import load
from normlab.sweep import make_plan

TINY = {"model.widths": "(4,)", "train.num_steps": "4", "probe.layer": "none"}

SOURCE = """
from normlab.experiment import *

EXPERIMENT = Experiment(
    claim="Normalizers change what a small net learns.",
    paper=Published(
        metric="test_accuracy", rows={rows}, setting="digits", source="nowhere", scales=("smoke",)
    ) if {published} else None,
    scales={scales} or {{"smoke": Scale("configs/digits.py", {fields})}},
    sweep={sweep},
    seeds={seeds},
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
        seeds="2",
        scales="{}",
        published=True,
    ):
        path = tmp_path / "an_experiment.py"
        path.write_text(
            textwrap.dedent(SOURCE).format(
                rows=rows,
                fields=fields,
                sweep=sweep,
                verdict=verdict,
                interval=interval,
                seeds=seeds,
                scales=scales,
                published=published,
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


LIGHT = ("batch_norm_mnist",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.commands if name in LIGHT else pytest.mark.slow)
        for name in names()
    ],
)
def test_every_experiment_runs_at_smoke_scale(name, tmp_path, capsys):
    """Of a few steps: its runs end, its verdict is given, its page is written."""
    command = ["sweep", name, "--seeds=2", f"--workdir={tmp_path / 'sweep'}"]
    fields = ["--config.train.num_steps=10", "--config.eval.every_steps=5"]
    assert main([*command, *fields]) == 0
    verdict = json.loads((tmp_path / "sweep" / "verdict.json").read_text())
    assert verdict["outcome"] in ("reproduced", "not reproduced", "underpowered")
    assert "report.html" in capsys.readouterr().out


@pytest.mark.commands
def test_what_a_scale_declares_is_not_the_command_lines(write, tmp_path):
    """A tuple of a scale is a list in sweep.json, on both sides."""
    folder = tmp_path / "runs"
    assert main(["sweep", write(), f"--workdir={folder}", "--jobs=1"]) == 0
    assert load(folder).overrides == {}
    other = tmp_path / "other"
    command = ["sweep", write(), f"--workdir={other}", "--jobs=1"]
    assert main([*command, "--config.train.num_steps=5", "--config.model.widths=(4,)"]) == 0
    assert load(other).overrides == {"train.num_steps": 5}


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
        ({"sweep": "__import__('sys').exit(3)"}, r"does not load: it calls sys\.exit\(3\)"),
        ({"rows": "{'none': '92'}"}, "published number of 'none' is '92', not a percentage"),
        ({"rows": "{'none': Measured(92.0, n='5')}"}, "published n of 'none' is '5'"),
        ({"rows": "{'none': Measured(92.0, float('nan'))}"}, "published nan of 'none'"),
        ({"rows": "5"}, "paper.rows is 5, not {normalizer: number}"),
        ({"published": False}, "paper is None, not a Published"),
        ({"scales": "{'smoke': 5}"}, r"scales\['smoke'\] is 5, not a config or a Scale"),
        ({"scales": "[1]"}, r"scales is \[1\], not {name: config or Scale}"),
        ({"scales": "{'smoke': Scale('c', seeds=0)}"}, "seeds at scale 'smoke' is 0"),
        ({"scales": "{'smoke': Scale('c', sweep=Grid(()))}"}, "'smoke' is an empty Grid"),
        ({"fields": ["a"]}, r"overrides at scale 'smoke' is \['a'\], not {field: value}"),
        ({"fields": {5: 1}}, "a field of the overrides at scale 'smoke' is 5"),
        ({"seeds": "2.5"}, "seeds at scale 'smoke' is 2.5, not a number of seeds"),
        ({"seeds": "'3'"}, "seeds at scale 'smoke' is '3'"),
        ({"seeds": "[1, 2]"}, r"seeds at scale 'smoke' is \[1, 2\]"),
        ({"seeds": "0"}, "seeds at scale 'smoke' is 0, and must be 1 or more"),
        ({"sweep": "{'norm': ['none']}"}, "sweep at scale 'smoke' is {'norm': .*not what grid"),
        ({"sweep": "[1, 2]"}, r"sweep at scale 'smoke' is \[1, 2\], not what grid"),
        ({"sweep": "Grid(())"}, "sweep at scale 'smoke' is an empty Grid"),
        ({"sweep": "grid({'norm': [['none'], 'x']})"}, r"norm in the sweep .* is \['none'\]"),
        (
            {
                "sweep": "grid({'norm': ['none']}, {'optim.base_lr': 0.1})"
                " + grid({'norm': ['none']}, {'optim.base_lr': 0.5})"
            },
            "two points called 'base · none', with optim.base_lr = 0.1 and 0.5",
        ),
        ({"verdict": "'yes'"}, "verdict at scale 'smoke' is 'yes', not a function of the rows"),
    ],
)
def test_a_mistake_in_a_declaration_is_one_line(write, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(path := write(**change))
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ("above('bach_norm', 'none')", "no normalizer 'bach_norm'; did you mean 'batch_norm'"),
        ("above('none', 'batch_norm')", "'none' stands in 2 settings; name one, as in ('none', "),
        ("close(('none', 'a'), ('none', 'c'), 1)", "no setting 'c' with 'none'; one of a, b"),
        ("close(('none', 'a'), ('batch_norm', 'b'), 1)", "no setting 'b' with 'batch_norm'"),
        ("above(['none'], 'none')", "['none'] is neither a normalizer nor"),
        ("'none'", "a hypothesis of the verdict is 'none'"),
    ],
)
def test_a_hypothesis_about_what_is_not_planned_is_refused(write, verdict, message):
    _, experiment = load_experiment(write(verdict=f"all_of({verdict})"))
    cells = [("none", "a"), ("none", "b"), ("batch_norm", "a")]
    with pytest.raises(UserError, match=re.escape(message)):
        check_verdict(experiment.verdict, cells)


def test_a_hypothesis_about_what_is_planned_is_not_refused(write):
    _, experiment = load_experiment(write(verdict="all_of(above('none', ('batch_norm', 'a')))"))
    check_verdict(experiment.verdict, [("none", "a"), ("batch_norm", "a")])
    check_verdict(lambda sweep: None, [])  # says nothing before the runs


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sweep": "grid({'norm': ['none'], 'optim.lr': [1]})"}, [], "'optim.lr'"),
        ({"sweep": "grid({'norm': ['nune']})", "rows": "{}"}, [], "did you mean 'none'"),
        ({}, ["--scale=paper"], "unknown scale 'paper'; one of smoke"),
        ({}, ["--seeds=0"], "--seeds=0 must be 1 or more"),
        ({}, ["--config.seed=1"], "seed=1 is set"),
        ({"verdict": "all_of(above('layer_norm', 'nune'))"}, [], "no normalizer 'nune'"),
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
    assert not folder.exists()


def test_a_verdict_that_fails_is_told_after_the_runs_are_done(write, tmp_path, capsys):
    folder = tmp_path / "sweep"
    for verdict, message in {
        "lambda sweep: 1 / 0": "ZeroDivisionError: division by zero",
        "lambda sweep: exit('no')": "SystemExit: no",
        "lambda sweep: Verdict('reproduced', ({1},), '')": "sentence {1} is no text",
    }.items():
        assert main(["sweep", write(verdict=verdict), f"--workdir={folder}"]) == 0
        assert message in capsys.readouterr().out
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


@pytest.mark.commands
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


@pytest.mark.commands
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--readme", "--results=TYPO"], "--results=TYPO has no meaning for --readme"),
        (["--readme", "batch_norm_mnist"], "'batch_norm_mnist' has no meaning for --readme"),
        (["--readme", "--scale=cpu"], "--scale=cpu has no meaning for --readme"),
        (["--readme", "--redo-other-commits"], "--redo-other-commits has no meaning"),
        (["--seeds=0"], "--seeds=0 has no meaning for a list of all"),
        (["--threads=1"], "--threads=1 has no meaning for a list of all"),
        (["--config.train.num_steps=4"], "--config.train.num_steps=4 has no meaning"),
    ],
)
def test_what_would_be_ignored_is_refused(capsys, arguments, message):
    page = experiments.experiments_folder() / "README.md"
    before = page.stat()
    assert main(["paper", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (page.stat().st_mtime_ns, page.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_the_readme_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiments, "experiments_folder", lambda: tmp_path)
    (tmp_path / "README.md").write_text("as it was")
    monkeypatch.setattr("os.fsync", full)
    assert main(["paper", "--readme"]) == 1
    assert "no space left" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "as it was"
    monkeypatch.undo()
    monkeypatch.setattr(experiments, "experiments_folder", lambda: tmp_path)
    assert main(["paper", "--readme"]) == 0
    assert (tmp_path / "README.md").read_text().startswith("# Experiments")


def test_the_list_says_what_a_command_needs_besides(capsys):
    assert main(["paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    needs_data = {tuple(x.split()[:2]) for x in lines if x.endswith("--config.data.path=PATH")}
    on_cifar = "normalizer_comparison agc_batch_size agc_layers agc_threshold nf_vs_bn_resnet"
    assert needs_data == {
        ("batch_norm_mnist", "cpu"),
        ("normalizer_comparison", "cpu"),
        ("nf_vs_bn_resnet", "cpu"),
        *((name, "cifar") for name in (*on_cifar.split(), "skipinit_depth")),
    }


def test_the_readme_of_the_experiments_is_what_their_results_say():
    from normlab.cli import paper
    from normlab.report.results import overview

    folder = experiments.experiments_folder()
    kept = (folder / "README.md").read_text(encoding="utf-8")
    assert kept == overview(paper._lines(), folder / "results")
