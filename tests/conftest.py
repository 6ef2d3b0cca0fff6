"""Compiles quickly: what tests compute is soon done, and XLA's optimizations take nearly all time.

The flag holds for this process alone. Commands that tests start are compiled as users' are.
"""

import os

import jax

before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{before or ''} --xla_backend_optimization_level=0".strip()
jax.jit(lambda x: x + 1)(0)  # XLA reads its flags once, at its first use
if before is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = before
