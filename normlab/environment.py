"""Settings of the process that must stand before Python or XLA starts.

Measured on ResNet-20, batch 128, float32, two x86 cores, jaxlib 0.10.2 (`scripts/bench_step.py`):

* glibc maps and unmaps every temporary buffer above 32 MiB at each call; transparent huge pages
  for malloc (`glibc.malloc.hugetlb=1`) remove the page faults that this costs.
* XLA's CPU backend hands single convolutions to YNNPACK, which is slower than Eigen at the sizes
  of CIFAR nets. The minus form takes this one fusion away and leaves the reductions alone.

Both change speed and the last bits of a result, never its meaning; the run's manifest holds them.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normlab.errors import UserError

_MALLOC_TUNABLE = "glibc.malloc.hugetlb=1"
_CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_REEXECUTED = "NORMLAB_ENTRY"

DETERMINISTIC_FLAGS = (
    "--xla_gpu_deterministic_ops=true",  # no atomics in sums, and no choice of kernels by a clock
    "--xla_gpu_exclude_nondeterministic_ops=true",  # what has no such form is not compiled
)
"""What GPUs need to give the same bytes again; jaxlib 0.10.2, 0.11 and 0.12 know both."""

RECORDED = (
    *("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_PLATFORMS", "NPROC", "CUDA_VISIBLE_DEVICES"),
    *("JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE"),
)
"""Environment variables that a run's manifest records."""


def entry_environment(
    environment: Mapping[str, str] | None = None, deterministic: bool = False
) -> dict[str, str]:
    """Returns the variables to add to `environment` (default: this process's) before Python starts.

    What the user has set is kept: a variable that already decides the matter is left out.
    `deterministic` adds `DETERMINISTIC_FLAGS`.
    """
    environment = os.environ if environment is None else environment
    extra = {}
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" not in tunables:
        extra["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, _MALLOC_TUNABLE]))
    there = environment.get("XLA_FLAGS", "")
    flags = [there] if there else []
    # XLA aborts on a flag that it does not know, so the flag goes only where it was seen to work.
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    if known and _CONVOLUTION_FLAG not in there:
        flags.append(f"{_CONVOLUTION_FLAG}=-individual_convolution")
    if deterministic:
        flags += [flag for flag in DETERMINISTIC_FLAGS if flag.partition("=")[0] not in there]
    if (text := " ".join(flags)) != there:
        extra["XLA_FLAGS"] = text
    return extra


def thread_environment(threads: int) -> dict[str, str]:
    """Returns the variables that hold XLA's CPU backend and BLAS to `threads` threads.

    The number of threads changes the order of sums and so the last bits of a result.
    """
    return {"NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}


def sharing_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the variables that let several processes use one GPU: memory is taken as needed.

    Otherwise the first one, even one that only counts devices, takes three quarters of it.
    """
    environment = os.environ if environment is None else environment
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    return {} if name in environment else {name: "false"}


def has_accelerator() -> bool:
    """Returns whether JAX will find a GPU or TPU, without asking it to start one."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    plugin = any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))
    gpu = plugin and any(Path("/dev").glob("nvidia[0-9]*"))
    return gpu or importlib.util.find_spec("libtpu") is not None


def may_have_devices() -> bool:
    """Returns whether JAX may find more than one device, without asking it to start."""
    flags = os.environ.get("XLA_FLAGS", "")
    virtual = "device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ
    return virtual or has_accelerator()


def reexecute(
    arguments: list[str],
    share_devices: bool = False,
    deterministic: bool = False,
    module: str = "normlab",
) -> None:
    """Starts `python -m MODULE ARGUMENTS` in this process's place, with the entry environment.

    Returns only if the environment stands already, or after one try.
    """
    extra = entry_environment(deterministic=deterministic)
    if share_devices:
        extra |= sharing_environment()
    if _REEXECUTED in os.environ or not extra:
        return
    sys.stdout.flush()
    environment = {**os.environ, **extra, _REEXECUTED: "1"}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def threads() -> int:
    """Returns the number of CPU threads that XLA's CPU backend uses in this process."""
    declared = os.environ.get("NPROC", "")
    return int(declared) if declared.isdigit() else len(os.sched_getaffinity(0))


# Determinism -------------------------------------------------------------------------------------


def is_deterministic(environment: Mapping[str, str] | None = None) -> bool:
    """Returns whether all of `DETERMINISTIC_FLAGS` are set."""
    environment = os.environ if environment is None else environment
    return set(DETERMINISTIC_FLAGS) <= set(environment.get("XLA_FLAGS", "").split())


def check_deterministic() -> None:
    """Raises UserError if XLA_FLAGS do not say what `--deterministic` promises."""
    if not is_deterministic():
        raise UserError(
            f"--deterministic needs XLA_FLAGS='{' '.join(DETERMINISTIC_FLAGS)}' before Python "
            f"starts, which is {os.environ.get('XLA_FLAGS', '')!r}"
        )


def determinism(platform: str, num_devices: int) -> dict[str, Any]:
    """Returns what a manifest says of it: `flags` set, what is `promised`, what is `not_promised`.

    `platform` is JAX's: cpu, gpu or tpu. Promised is what the same command gives when it is run
    again; what it could not be promised for stands beside it.
    """
    unlike = [
        f"another number of threads than {threads()}" if platform == "cpu" else "",
        f"another number of devices than {num_devices}",
        "another kind of device",
        "other versions of the packages, or another commit",
    ]
    doubts = []
    if platform == "gpu" and not is_deterministic():
        doubts = ["atomic sums and kernels chosen by their speed: --deterministic is not set"]
    if platform == "gpu" and num_devices > 1:
        doubts.append("sums over devices, whose order is the communication library's")
    if platform not in ("cpu", "gpu"):
        doubts = [f"{platform}: never tried"]
    return {
        "flags": is_deterministic(),
        "promised": "nothing" if doubts else "the same bytes from the same command",
        "not_promised": doubts + [reason for reason in unlike if reason],
    }
