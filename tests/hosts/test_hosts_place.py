"""Which process of a run this one is, from flags and from what clusters set."""

import pytest

from normlab.cli import main
from normlab.errors import UserError
from normlab.hosts import Place, _Heard, check_reachable, find_place, first_node, lost

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-010],login",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
}
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "1",
    "JAX_COORDINATOR_ADDRESS": "train-0.train:29400",
    "JAX_NUM_PROCESSES": "2",
}
TPU = {"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "TPU_WORKER_ID": "1"}


def test_flags_say_all_and_no_variable_is_looked_at():
    assert find_place("10.0.0.1:99", 4, 3, SLURM) == Place("10.0.0.1:99", 4, 3)


def test_a_step_of_slurm_says_who_is_who():
    # 61440 + (5000 + 2) mod 4096 = 61440 + 906.
    assert find_place(environment=SLURM) == Place("gpu007:62346", 4, 3)


def test_an_indexed_job_of_kubernetes_says_who_is_who():
    assert find_place(environment=KUBERNETES) == Place("train-0.train:29400", 2, 1)


def test_a_tpu_says_who_is_who():
    assert find_place(environment=TPU) == Place("10.0.0.2:8476", 2, 1)
    # The pods of a Job on GKE's TPUs have both; what the manifest leaves out is the TPU's.
    assert find_place(environment={**TPU, "JOB_COMPLETION_INDEX": "0"}).index == 1


def test_a_flag_goes_before_a_variable():
    assert find_place("other:1", environment=SLURM) == Place("other:1", 4, 3)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[003,007-015]", "node003"),
        ("rack[2-3]-a,b", "rack2-a"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ["n[1-", "n]1", "[", ",a"])
def test_what_is_no_list_of_nodes_is_refused(nodes):
    assert first_node(nodes) == ""
    with pytest.raises(UserError, match="is no list of nodes"):
        find_place(environment=SLURM | {"SLURM_STEP_NODELIST": nodes})


def test_a_coordinator_whose_name_is_unknown_is_said_before_anything_starts():
    check_reachable(Place("127.0.0.1:1", 2, 1))
    with pytest.raises(UserError, match=r"host 'nohost\.invalid' has no address"):
        check_reachable(Place("nohost.invalid:1", 2, 1), seconds=0)


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ((), {}, "--distributed needs --coordinator: no variable of SLURM"),
        (("a:1", 2), {}, "--distributed needs --process-id: no"),
        (("a:1", 4, 4), {}, r"--process-id=4 must be from 0 to 3 \(--num-processes=4\)"),
        (("a:1", 4, -1), {}, r"--process-id=-1 must be a whole number from 0"),
        (("a:1", 0, 0), {}, "--num-processes=0 must be 1 or more"),
        (("a", 2, 0), {}, "--coordinator=a must be HOST:PORT of process 0"),
        (("a:70000", 2, 0), {}, "--coordinator=a:70000 must be HOST:PORT"),
        ((), {"SLURM_JOB_ID": "5"}, "in a SLURM job: start it with srun"),
        ((), {**SLURM, "SLURM_PROCID": "4"}, r"SLURM_PROCID=4 must be from 0 to 3 \(SLURM_STEP_"),
        ((), {"JOB_COMPLETION_INDEX": "0"}, "needs --coordinator"),
        ((), {**KUBERNETES, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two must be a whole"),
        ((), {**TPU, "MEGASCALE_NUM_SLICES": "2"}, "over several TPU slices needs --coordinator"),
    ],
)
def test_what_is_missing_or_cannot_be_is_one_line(flags, variables, message):
    with pytest.raises(UserError, match=message) as caught:
        find_place(*flags, environment=variables)
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_before_anything_is_started(tmp_path, capsys):
    command = ["train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    address = ["--coordinator=127.0.0.1:99", "--num-processes=4"]
    assert main([*command, *address, "--process-id=4"]) == 2
    assert capsys.readouterr().err == (
        "normlab: --process-id=4 must be from 0 to 3 (--num-processes=4)\n"
    )
    assert main([*command, *address, "--process-id=0", "--distributed-timeout=0"]) == 2
    assert "--distributed-timeout=0 must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_jax_says_of_its_abort_is_left_out_and_all_else_is_handed_on(capsys):
    heard = _Heard()
    dying = "E1122 00:08:11.317474   18832 coordination_service_agent.cc:289] Polled an error\n"
    trace = "    @     0x7f32db440634  absl::log_internal::LogMessage::Flush()\n"
    mine = "normlab: 3 steps up to 20 were not finite\n"
    heard.listen(["a warning\n", mine, dying, trace])
    assert capsys.readouterr().err == "a warning\n" + mine
    assert heard.last_words == [dying, trace]
    assert not heard.said_lost
    line = f"normlab: {lost(1, 2)}\n"
    heard.listen([line])
    assert capsys.readouterr().err == line
    assert heard.said_lost
