"""The number of devices is fixed when JAX starts, so these tests have a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # `make devices` has all normalizers in whole nets
def test_statistics_over_eight_devices():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    tests = Path(__file__).with_name("on_eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert "failed" not in ended.stdout
