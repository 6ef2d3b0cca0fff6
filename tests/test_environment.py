"""Settings that must stand before Python starts."""

import importlib.metadata
import os
import subprocess
import sys

from normlab import environment, pool
from normlab.environment import (
    entry_environment,
    has_accelerator,
    sharing_environment,
    thread_environment,
    threads,
)

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def test_both_settings_are_added_to_an_empty_environment():
    extra = entry_environment({})
    assert extra["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        assert extra["XLA_FLAGS"] == f"{FLAG}=-individual_convolution"


def test_what_the_user_has_set_is_kept():
    extra = entry_environment({"XLA_FLAGS": "--xla_foo=1", "GLIBC_TUNABLES": "glibc.a=b"})
    assert extra.get("XLA_FLAGS", "--xla_foo=1").startswith("--xla_foo=1")
    assert extra["GLIBC_TUNABLES"] == "glibc.a=b:glibc.malloc.hugetlb=1"
    decided = {"XLA_FLAGS": f"{FLAG}=", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert entry_environment(decided) == {}


def test_the_thread_count_reaches_xla(monkeypatch):
    for name, value in thread_environment(3).items():
        monkeypatch.setenv(name, value)
    assert threads() == 3
    monkeypatch.delenv("NPROC")
    assert threads() == len(os.sched_getaffinity(0))


def test_processes_that_share_a_gpu_take_memory_as_needed_unless_the_user_says_otherwise():
    assert sharing_environment({}) == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert sharing_environment({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}) == {}


def test_the_platform_decides_whether_there_is_an_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not has_accelerator()
    assert pool.default_jobs(1) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert has_accelerator()
    assert pool.default_jobs(1) == 1  # sixteen cores would else start sixteen runs on one GPU
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert not has_accelerator()


def test_importing_normlab_and_its_report_imports_nothing_heavy():
    code = (
        "import sys, normlab, normlab.report, normlab.cli, normlab.run, normlab.errors\n"
        "import normlab.data.info\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'sklearn', 'scipy.stats', 'matplotlib.pyplot'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_training_imports_no_tensorflow_and_no_backend_of_data_it_does_not_use():
    code = (
        "import sys, normlab.training.loop, normlab.training.restore, normlab.pool\n"
        "from normlab.config import load_config\n"
        "from normlab.training.setup import build_parts\n"
        "build_parts(load_config('configs/cifar10.py'), need_data=False)\n"
        "heavy = {'tensorflow', 'sklearn', 'tensorflow_datasets', 'PIL', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
