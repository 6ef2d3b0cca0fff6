"""What needs no cluster: options, tables, scripts, one task, the manifest for Kubernetes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from normlab import grid, launchers, pool, run, sweep
from normlab.errors import UserError
from normlab.launchers import task
from normlab.launchers.kubernetes import Kubernetes
from normlab.launchers.slurm import Slurm, minutes, queue, table

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "scripts" / "slurm_test_cluster.sh", *(ROOT / "scripts/templates").glob("*.s*")]
TINY = {"model.widths": "(4,)", "model.strides": "(2,)", "train.num_steps": "4"}


def plan_of(norms=("none", "batch_norm"), seeds=(0,)):
    varied = grid.settings({"base": {}}) * grid.grid({"norm": norms})
    return sweep.make_plan("configs/digits.py", varied, seeds=seeds, overrides=TINY)


# Options


def test_options_become_fields_of_their_types():
    found = launchers.parse("slurm:partition=gpu,time=4:00:00,gpus=2,memory=1.5,poll=0.5")
    assert found == Slurm(partition="gpu", time="4:00:00", gpus=2, memory=1.5, poll=0.5)
    # Only the first colon and the first sign of equality divide.
    image = "registry.example.com:5000/normlab:latest"
    found = launchers.parse(f"kubernetes:image={image},claim=runs")
    assert (found.image, found.claim) == (image, "runs")
    assert launchers.parse("local") == launchers.LAUNCHERS["local"]()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slrum", "unknown launcher 'slrum'; did you mean 'slurm'?"),
        ("slurm:partion=gpu", "'partion'; did you mean 'partition'?"),
        ("slurm:gpus", "'gpus' is not option=value"),
        ("kubernetes:image=a,claim=c,mount=runs", "mount='runs' must begin with '/', as '/runs'"),
        ("slurm:gpus=two", "gpus='two' is not a whole number"),
        ("slurm:gpus=-1", "gpus='-1' is not a whole number"),
        ("slurm:memory=0", "memory='0' is not a number above 0"),
        ("slurm:memory=nan", "memory='nan' is not a number above 0"),
        ("slurm:partition=", "partition='' is not a name"),
        ("slurm:gpus=1,gpus=2", "gives 'gpus' twice"),
        ("slurm:time=soon", "time='soon' is no time"),
        ("slurm:time=1", "(1 min) must be longer than grace=90 s"),
        ("kubernetes:claim=runs", "needs image=..."),
        ("local:gpus=1", "unknown option of the launcher 'local': 'gpus'"),
    ],
)
def test_a_wrong_option_is_named(text, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        launchers.parse(text)


def test_the_page_names_every_option():
    page = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    for name in ("slurm", "kubernetes"):
        for option in launchers.LAUNCHERS[name].__dataclass_fields__:
            assert f"`{option}`" in page, option


# SLURM's words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:00", 90),
        ("90:01", 91),  # rounded up
        ("0:30", 1),
        ("4:00:00", 240),
        ("0:59:59", 60),
        ("2-12", (2 * 24 + 12) * 60),
        ("2-12:30", (2 * 24 + 12) * 60 + 30),
        ("1-00:00:01", 24 * 60 + 1),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text, expected):
    assert minutes(text) == expected


def test_a_table_of_the_queue():
    shown = "normlab-1a|0|RUNNING\nnormlab-1a|7|PENDING\n normlab-2b|N/A|COMPLETING\n"
    assert list(table(shown)) == [
        ("normlab-1a", 0, "RUNNING"),
        ("normlab-1a", 7, "PENDING"),
        ("normlab-2b", 0, "COMPLETING"),
    ]


def test_the_queue_of_a_sweep_is_of_its_own_arrays(tmp_path, monkeypatch):
    assert queue(tmp_path) == {}  # squeue is not even asked
    plan = plan_of()
    home = tmp_path / "sweep" / "slurm" / "normlab-1a"
    home.mkdir(parents=True)
    (home / "tasks.json").write_text(task.as_text(plan.runs, tmp_path / "sweep"))
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "normlab-1a|1|PENDING"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert queue(tmp_path / "sweep") == {plan.runs[1].id: "PENDING"}
    assert "--name=normlab-1a" in (tmp_path / "squeue.asked").read_text()


def test_what_an_array_asks_for():
    asked = Slurm(partition="gpu", gpus=1, memory=1.5, time="2:00:00").parameters("name", 8, 4)
    assert asked["cpus_per_task"] == 4  # as many as the run has threads
    assert asked["mem"] == "1536MB"
    assert asked["time"] == 120
    assert asked["array_parallelism"] == 8
    assert asked["additional_parameters"] == {"requeue": True}
    assert "export NPROC=4" in asked["setup"]
    assert "account" not in asked  # what is not given is the cluster's to choose
    pytest.importorskip("submitit", reason="submitit is not installed (requirements-dev.txt)")
    from submitit.slurm.slurm import _make_sbatch_string

    text = _make_sbatch_string(command="true", folder=Path("logs"), map_count=20, **asked)
    assert "#SBATCH --array=0-19%8" in text
    assert "#SBATCH --signal=USR2@90" in text


def test_without_submitit_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^the launcher 'slurm' needs submitit; install it by: "):
        Slurm()(plan_of(), tmp_path, None, 1, lambda event: None)
    assert list(tmp_path.iterdir()) == []


# One task


def tasks_of(plan, folder):
    path = folder / "tasks.json"
    path.write_text(task.as_text(plan.runs, folder))
    return path


def start(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", task.MODULE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.slow
def test_a_pod_trains_the_run_of_its_index(tmp_path, monkeypatch):
    plan = plan_of()
    monkeypatch.setenv(task.INDEX, "1")
    ended = start(tasks_of(plan, tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("done, test accuracy")
    assert [run.read_status(tmp_path / x.id) for x in plan.runs] == ["planned", "done"]
    assert pool.unsettled(plan, tmp_path)[1] == [plan.runs[0]]


def test_a_task_that_is_none_is_a_mistake(tmp_path):
    path = tasks_of(plan_of(), tmp_path)
    with pytest.raises(UserError, match="has the tasks 0 to 1, no task 2"):
        task.run_indexed(path, 2)
    path.write_text("{}")
    with pytest.raises(UserError, match="holds no tasks"):
        task.run_indexed(path, 0)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ({"state": "done"}, 0),
        ({"state": "diverged"}, 0),  # it has ended, and would end so again
        ({"state": "failed"}, 1),
        ({"state": "failed", "exit_code": 2}, 2),
        ({"state": "interrupted", "signal": 15}, 143),
    ],
)
def test_the_exit_code_of_an_outcome(outcome, code):
    assert task.exit_code(outcome) == code


def test_a_mistake_in_a_task_ends_with_2_and_stands_in_the_folder(tmp_path):
    [planned] = plan_of(norms=("none",)).runs
    folder = tmp_path / planned.id
    folder.mkdir()
    run.write_json(folder / "identity.json", {"of": "another run"})
    (folder / "manifest.json").write_text("{}")
    path = tasks_of(plan_of(norms=("none",)), tmp_path)
    outcome = task.run_indexed(path, 0)
    assert task.exit_code(outcome) == 2
    assert run.read_json(folder / "status.json")["message"] in outcome["message"]


# Kubernetes

POD = Kubernetes(image="normlab:1", claim="runs", gpus=1, data_claim="data")


def test_the_manifest_is_what_the_api_of_jobset_takes():
    """Read and written by the models that the API's own description generates: nothing is lost."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api (requirements-dev.txt)"
    )
    _, ours = POD.manifest(plan_of().runs, "digits", 3, 1)
    template = yaml.safe_load((ROOT / "scripts/templates/kubernetes_train.yaml").read_text())
    for document in (ours, template):
        assert models.JobsetV1alpha2JobSet.from_dict(document).to_dict() == document
    broken = json.loads(json.dumps(ours).replace("backoffLimitPerIndex", "backoffLimitPerIndx"))
    assert models.JobsetV1alpha2JobSet.from_dict(broken).to_dict() != broken
    broken["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = "four"
    with pytest.raises(ValueError, match="completions"):
        models.JobsetV1alpha2JobSet.from_dict(broken)


def test_each_pod_finds_its_run_and_what_it_needs(tmp_path):
    plan = plan_of()
    config_map, jobset = POD.manifest(plan.runs, "My sweep!", 3, 2)
    assert config_map["metadata"]["name"] == jobset["metadata"]["name"]
    assert re.fullmatch("normlab-my-sweep-[0-9a-f]{8}", jobset["metadata"]["name"])
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (2, 2)  # no more pods than runs
    [container] = job["template"]["spec"]["containers"]
    (tmp_path / "tasks.json").write_text(config_map["data"]["tasks.json"])
    assert container["command"][-1] == "/etc/normlab/tasks.json"
    tasks = task.read_tasks(tmp_path / "tasks.json")
    assert [x["workdir"] for x in tasks] == [f"/runs/My sweep!/{x.id}" for x in plan.runs]
    # What is mounted is there to be mounted.
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert {"name": "NPROC", "value": "2"} in container["env"]
    assert container["resources"]["limits"]["cpu"] == "2"
    # A pod failure policy is for pods that are never started again in place (Kubernetes' rule).
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_same_work_is_the_same_jobset_and_other_work_another():
    names = [
        POD.manifest(plan_of(seeds=range(n)).runs, "x", None, 1)[1]["metadata"]["name"]
        for n in (1, 1, 2)
    ]
    assert names[0] == names[1] != names[2]


def test_too_many_runs_for_a_manifest_are_refused():
    many = plan_of(norms=("none",)).runs * 6000
    with pytest.raises(UserError, match=r"^6000 runs take .* split the sweep"):
        POD.manifest(many, "x", None, 1)


@pytest.mark.slow
def test_compare_writes_the_manifest_and_in_the_end_the_report(tmp_path, capsys):
    from normlab.cli import main

    folder = tmp_path / "digits"
    command = ["compare", "configs/digits.py", "--norms=none", "--seeds=1", f"--workdir={folder}"]
    command += [f"--config.{name}={value}" for name, value in TINY.items()]
    launched = [*command, "--launcher=kubernetes:image=normlab:1,claim=runs"]
    assert main(launched) == 0
    assert f"kubectl apply --server-side -f {folder / 'jobset.yaml'}" in capsys.readouterr().out
    assert not (folder / "report.md").exists()
    config_map, jobset = yaml.safe_load_all((folder / "jobset.yaml").read_text())
    assert (config_map["kind"], jobset["kind"]) == ("ConfigMap", "JobSet")
    # What the pod does, here: the claim's folder is the sweep's.
    [entry] = json.loads(config_map["data"]["tasks.json"])["tasks"]
    assert entry["workdir"] == f"/runs/digits/{entry['id']}"
    tasks = folder / "tasks.json"
    tasks.write_text(json.dumps({"tasks": [entry | {"workdir": str(folder / entry["id"])}]}))
    assert task.run_indexed(tasks, 0)["state"] == "done"
    assert main(launched) == 0
    assert "1 run, done" in capsys.readouterr().out


# Scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_the_templates_are_three():
    names = {path.name for path in (ROOT / "scripts" / "templates").iterdir()}
    assert names == {"slurm_train.sbatch", "tpu_pod.sh", "kubernetes_train.yaml"}


def test_the_tpu_template_starts_one_command_on_all_machines(tmp_path, monkeypatch):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        '#!/bin/sh\ncase "$*" in *describe*) echo "10.0.0.1 10.0.0.2" ;;'
        " *) printf '%s\\n' \"$@\" ;; esac\n"
    )
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = ROOT / "scripts" / "templates" / "tpu_pod.sh"
    arguments = ["slice", "zone", "--config=a.py", "--config.model.widths=(1, 2)"]
    shown = subprocess.run([script, *arguments], capture_output=True, text=True, check=True).stdout
    [command] = [x for x in shown.splitlines() if x.startswith("--command=")]
    assert "--coordinator=10.0.0.1:8476 --num-processes=2 --process-id=$(curl " in command
    assert r"--config.model.widths=\(1\,\ 2\)" in command  # as the shell there needs it
    assert "--worker=all" in shown


def test_the_cluster_script_says_how_it_is_used(tmp_path):
    script = ROOT / "scripts" / "slurm_test_cluster.sh"
    shown = subprocess.run([script], capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert "slurm_test_cluster.sh start [DIR]" in shown.stderr
    shown = subprocess.run(
        [script, "status", tmp_path], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 1
    assert "slurmctld does not run" in shown.stdout
