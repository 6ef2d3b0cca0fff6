"""Compiles quickly: what tests compute is soon done, and XLA's compiler takes nearly all time.

The flags hold for this process alone. Commands that tests start are compiled as users' are.
"""

import os

import jax

QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",  # the older ones compile in half the time
    "--xla_cpu_parallel_codegen_split_count=1",
)

before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = " ".join(filter(None, (before, *QUICK)))
jax.jit(lambda x: x + 1)(0)  # XLA reads its flags once, at its first use
if before is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = before
