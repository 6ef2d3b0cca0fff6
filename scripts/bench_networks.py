"""ResNet-20 (He et al. 2016, shortcut A) written three ways, for `bench_step.py`.

Each contender is a function (batch_size) -> step; step() takes one SGD-momentum step on a fixed
batch of random images and returns when it is done.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

LEARNING_RATE, MOMENTUM = 0.1, 0.9
STAGES, BLOCKS = (16, 32, 64), 3

Step = Callable[[], None]


def random_batch(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images float32 [N, 32, 32, 3] and labels int32 [N]."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch_size, 32, 32, 3), np.float32)
    return images, rng.integers(0, 10, batch_size, dtype=np.int32)


def normlab(batch_size: int) -> Step:
    """normlab's own model, convolution, normalizer and train step."""
    import jax

    from normlab.config import load_config
    from normlab.training.parallel import Compiler
    from normlab.training.setup import build_parts
    from normlab.training.state import create_state
    from normlab.training.step import make_train_step

    config = load_config(
        "configs/cifar10.py", {"train.batch_size": batch_size, "optim.schedule": "constant"}
    )
    config.optim.weight_decay = 0.0
    parts = build_parts(config, need_data=False)
    compiler = Compiler()
    state = create_state(parts, compiler)
    batch = jax.device_put(random_batch(batch_size))
    train_step = make_train_step(parts.model, parts.direction, parts.schedule)
    compiled = compiler("step", train_step, state, batch, donate=(0,))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state, batch))

    return step


def flax(batch_size: int) -> Step:
    """The same network with flax.linen.Conv and BatchNorm and optax, as one writes it plainly."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            def conv_norm(x: Any, features: int, stride: int) -> Any:
                side = (1, 1)
                x = nn.Conv(features, (3, 3), stride, padding=(side, side), use_bias=False)(x)
                return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

            x = nn.relu(conv_norm(x, 16, 1))
            for stage, features in enumerate(STAGES):
                for block in range(BLOCKS):
                    stride = 2 if stage and not block else 1
                    y = nn.relu(conv_norm(x, features, stride))
                    y = conv_norm(y, features, 1)
                    if stride == 2:
                        x = x[:, ::2, ::2]
                        x = jnp.pad(x, [(0, 0)] * 3 + [(0, features - x.shape[-1])])
                    x = nn.relu(x + y)
            return nn.Dense(10)(x.mean((1, 2)))

    model = Network()
    images, labels = jax.device_put(random_batch(batch_size))
    variables = model.init(jax.random.key(0), images, train=True)
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def loss_function(params: Any, batch_stats: Any) -> Any:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updated["batch_stats"]

    @jax.jit
    def train_step(params: Any, batch_stats: Any, opt_state: Any) -> Any:
        gradient, batch_stats = jax.grad(loss_function, has_aux=True)(params, batch_stats)
        update, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, update), batch_stats, opt_state

    state = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(train_step(*state))

    return step


def torch(batch_size: int) -> Step:
    """The same network in PyTorch, channels last; on the GPU where there is one."""
    import torch
    from torch import nn
    from torch.nn import functional

    def conv_norm(inputs: int, features: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(features))

    class Block(nn.Module):
        def __init__(self, inputs: int, features: int, stride: int) -> None:
            super().__init__()
            self.first = conv_norm(inputs, features, stride)
            self.second = conv_norm(features, features, 1)
            self.stride, self.more = stride, features - inputs

        def forward(self, x: Any) -> Any:
            y = self.second(functional.relu(self.first(x)))
            if self.stride == 2:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
            return functional.relu(x + y)

    layers: list[nn.Module] = [conv_norm(3, 16, 1), nn.ReLU()]
    inputs = 16
    for stage, features in enumerate(STAGES):
        for block in range(BLOCKS):
            layers.append(Block(inputs, features, 2 if stage and not block else 1))
            inputs = features
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = model.to(device, memory_format=torch.channels_last)
    images, labels = random_batch(batch_size)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last).to(device)
    y = torch.from_numpy(labels).long().to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


CONTENDERS = {"normlab": normlab, "flax": flax, "torch": torch}
