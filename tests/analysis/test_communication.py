"""What devices tell each other: counted from shapes, from the jaxpr, and in XLA's own program."""

import os
import subprocess
import sys

import pytest

from normlab.analysis import communication
from normlab.analysis.communication import BACKWARD, FORWARD, GRADIENT, NETWORKS, Volume
from normlab.cli import main
from normlab.config import load_config
from normlab.errors import UserError

TWO_LAYERS = {"model.widths": (8, 8), "model.strides": (2, 2)}


def of_step(norm, devices=8, **fields):
    named = {name.replace("__", "."): value for name, value in fields.items()}
    config = load_config(f"configs/digits.py:norm={norm}", TWO_LAYERS | named)
    return communication.of_step(config, devices)


def test_global_batch_norm_sums_two_statistics_a_layer_forward_and_two_backward():
    """2 layers of 8 channels: 2 · 2 · 8 float32 each way; the second layer waits for the first.

    A ring of 8 sends 2 · 7/8 of it.
    """
    volumes = of_step("batch_norm")
    assert volumes[FORWARD] == Volume(rounds=4, payload=128, sent=224.0)
    assert volumes[BACKWARD] == Volume(rounds=4, payload=128, sent=224.0)


def test_the_gradient_is_summed_at_once_whatever_the_normalizer():
    """Kernels 3·3·1·8 + 3·3·8·8, head 8·10 + 10, scale and bias 2 · 2 · 8: 770 float32.

    With them go the loss, the number of hits and the number of unsound statistics.
    """
    for norm in ("batch_norm", "group_norm"):
        assert of_step(norm)[GRADIENT] == Volume(1, 4 * (770 + 3), 2 * 7 / 8 * 4 * (770 + 3))


def test_statistics_within_an_example_say_nothing():
    volumes = of_step("group_norm")
    assert volumes[FORWARD] == volumes[BACKWARD] == Volume()


def test_by_device_only_the_running_averages_are_summed():
    """Mean and variance of 2 layers of 8 channels, forward, all in one round."""
    volumes = of_step("batch_norm", batch_stats__scope="device")
    assert volumes[FORWARD] == Volume(rounds=1, payload=128, sent=224.0)
    assert volumes[BACKWARD] == Volume()


def test_ghosts_over_two_devices_send_less_over_rings_of_two():
    """16 examples on 2 of 8 devices: 2 · 1/2 of 128 bytes each way, and the running averages."""
    volumes = of_step("batch_norm", batch_stats__scope="ghost", batch_stats__ghost_size=16)
    assert volumes[FORWARD].sent == 128.0 + 224.0
    assert volumes[BACKWARD].sent == 128.0


def test_more_devices_send_more_and_have_no_more_of_their_own():
    few, many = of_step("batch_norm", 2), of_step("batch_norm", 64)
    assert few[FORWARD].payload == many[FORWARD].payload
    assert many[FORWARD].sent == few[FORWARD].sent * (2 * 63 / 64) / (2 * 1 / 2)


def test_microbatches_repeat_the_statistics_and_not_the_gradient():
    ghost = {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 16}
    once, twice = (
        of_step("batch_norm", **ghost),
        of_step("batch_norm", **ghost, train__microbatches=2),
    )
    assert twice[BACKWARD].rounds == 2 * once[BACKWARD].rounds
    assert twice[GRADIENT] == once[GRADIENT]


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(UserError, match="a batch of 64 does not split over 7 × 1 equal shares"):
        of_step("batch_norm", 7)
    ghost = {"train__batch_size": 96, "batch_stats__scope": "ghost", "batch_stats__ghost_size": 32}
    with pytest.raises(UserError, match="groups of 32 examples do not fit 8 devices of 12"):
        of_step("batch_norm", **ghost)


PROGRAM = """
  %a = f32[16,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to=%s
  %b = (f32[8]{0}, s32[]) all-reduce(%y, %z), channel_id=2, replica_groups=[1,8]<=[8], to=%s
  %c = bf16[64]{0} all-gather(%v), channel_id=3, replica_groups=mesh['i'=8] {'i'}, dimensions={0}
"""


def test_a_program_is_read_as_xla_writes_it():
    """256 bytes over 4 devices, 36 over 8, and 16 bytes that 7 others get."""
    found = communication.of_program(PROGRAM, 8)
    assert found == Volume(3, 256 + 36 + 16, 256 * 6 / 4 + 36 * 14 / 8 + 16 * 7)


COMPILED = """
import jax, jax.numpy as jnp, functools, sys
from normlab.analysis import communication
from normlab.config import load_config
from normlab.training import parallel
from normlab.training.setup import build_parts
from normlab.training.state import initial_state
from normlab.training.step import Batch, how_to_step

config = load_config(f"configs/digits.py:norm={sys.argv[1]}",
                     {"model.widths": (8, 8), "model.strides": (2, 2), "parallel.mode": "pmap"})
parts, layout = build_parts(config), parallel.make_layout(config)
state = jax.eval_shape(functools.partial(initial_state, parts), jnp.uint32(0))
batch = Batch(jnp.zeros((8, 8, *parts.info.image_shape)), jnp.zeros((8, 8), jnp.int32))
step = parallel.Compiler()("step", how_to_step(parts, None)[0], state, batch, layout=layout)
found = communication.of_program(step.as_text(), 8)
told = sum(communication.of_step(config, 8).values(), communication.Volume())
print(found.payload, found.sent, told.payload, told.sent, found.rounds >= told.rounds)
"""


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch_norm", "full_norm", "online_norm", "group_norm"])
def test_what_is_counted_is_what_xla_compiles(norm):
    """Sums, sums in the gradient alone, gathers, and nothing: the same bytes, to the byte."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    ended = subprocess.run(
        [sys.executable, "-c", COMPILED, norm],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    payload, sent, told_payload, told_sent, enough_rounds = ended.stdout.split()
    assert (payload, sent) == (told_payload, told_sent)
    assert enough_rounds == "True"


def test_the_model_of_a_network_is_latency_for_statistics_and_bandwidth_for_the_gradient():
    """ResNet-50's statistics are small and many, its gradient large and one."""
    ethernet = next(network for network in NETWORKS if "Ethernet" in network.name)
    statistics, gradient = Volume(196, 0, 0.0), Volume(1, 0, 200e6)
    assert ethernet.seconds(statistics) == pytest.approx(196 * ethernet.latency)
    assert ethernet.seconds(gradient) == pytest.approx(ethernet.latency + 200e6 / 12.5e9)


def test_latencies_are_nccls_own_numbers():
    """One host: 3.6 + 14 · 0.47 µs. Eight: 4.4 + 2 · (7 · 1.8 · 0.52 + 3 · 5) µs."""
    latency = {network.name.partition(",")[0]: network.latency for network in NETWORKS}
    assert latency["NVLink 4"] == pytest.approx(10.18e-6)
    assert latency["InfiniBand NDR"] == pytest.approx(47.504e-6)


def test_inspect_shows_it(capsys):
    config = "--config=configs/digits.py"
    assert main(["inspect", config, "--communication=8"]) == 0
    header, forward, *_, network = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "a step, each device"
    assert forward.startswith(FORWARD)
    assert network.startswith("NVLink 4, 8 GPUs (a model, no measurement)")
    assert main(["inspect", config, "--communication=7"]) == 2
    assert "does not split over 7" in capsys.readouterr().err
