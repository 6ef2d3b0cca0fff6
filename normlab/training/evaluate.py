"""Exact evaluation: every example once, whatever the batch size or the number of devices.

Three accuracies for a normalizer with state, because they differ where it matters:

* running statistics: what the trained network is, the headline;
* batch statistics: each evaluation batch normalized as in training, in one fixed shuffle;
* recomputed statistics: one pass over the whole training set at the final weights, its moments
  merged by the law of total variance (as PreciseBN, Wu & Johnson 2021, arXiv:2105.07576), without
  augmentation.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array
from jax.sharding import Mesh

from normlab.data import DatasetInfo, Examples, eval_indices, fetch
from normlab.norms.functional import Moments, merge_moments
from normlab.training.examples import Feed, RunData
from normlab.training.parallel import Compiler, shard_rows, splittable
from normlab.training.setup import Parts
from normlab.training.step import cross_entropy

SHUFFLE_SEED = 0  # of the one fixed order in which batch statistics are evaluated

Variables = dict[str, Any]
Batches = Iterable[tuple[np.ndarray, np.ndarray]]  # (indices int32 [B], mask bool [B])


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates one model."""

    model: nn.Module
    info: DatasetInfo
    mesh: Mesh
    compiler: Compiler

    def running(self, variables: Variables, examples: Feed, batch_size: int) -> dict[str, float]:
        """Returns accuracy and loss (nats) with running statistics.

        `batch_size` changes speed and memory, not the accuracy.
        """

        def measure(variables: Variables, data: Examples, rows: Array, mask: Array) -> Any:
            images, labels = self._fetch(data, rows)
            logits: Any = self.model.apply(variables, images, train=False)
            return _count(logits, labels, mask)

        batches = self._batches(len(examples), batch_size)
        return self._total("evaluate_running", measure, variables, examples, batches)

    def batch(self, variables: Variables, examples: Feed, batch_size: int) -> dict[str, float]:
        """Returns accuracy and loss with each batch normalized by its own statistics.

        `batch_size` is the training's; scope and ghost size are the model's. A last, smaller batch
        is padded and masked, so no statistic sees the padding.
        """

        def measure(variables: Variables, data: Examples, rows: Array, mask: Array) -> Any:
            images, labels = self._fetch(data, rows)
            logits, _ = self.model.apply(
                variables, images, train=True, mask=mask, mutable=["batch_stats"]
            )
            return _count(logits, labels, mask)

        batches = self._shuffled(len(examples), batch_size)
        return self._total("evaluate_batch", measure, variables, examples, batches)

    def recompute(
        self,
        variables: Variables,
        examples: Feed,
        batch_size: int,
        *,
        num_batches: int | None = None,
    ) -> Variables:
        """Returns the variables with the statistics of one exact pass over `examples`.

        The weights stand still, each batch is normalized by its own statistics as in training, and
        counters are kept. With `num_batches`, of that many batches of one fixed shuffle instead.
        """

        def gather(variables: Variables, data: Examples, rows: Array, mask: Array) -> Any:
            images, _ = self._fetch(data, rows)
            collections = ["batch_stats", "batch_moments"]
            _, sown = self.model.apply(
                variables, images, train=True, mask=mask, mutable=collections
            )
            return sown.get("batch_moments", {})  # none where overrides left no such layer

        def add(total: Any, moments: Any) -> Any:
            return jax.tree.map(merge_moments, total, moments, is_leaf=_is_moments)

        total = None
        batches = self._training_batches(len(examples), batch_size)
        if num_batches is not None:
            batches = islice(self._shuffled(len(examples), batch_size), num_batches)
        for arguments in _arguments(variables, examples, batches):
            moments = self.compiler("recompute", gather, *arguments)(*arguments)
            total = (
                moments
                if total is None
                else self.compiler("add", add, total, moments)(total, moments)
            )
        stats = traverse_util.flatten_dict(variables["batch_stats"])
        for (*path, _), moments in traverse_util.flatten_dict(total).items():
            norm: Any = self.model.norm.at("/".join(path)).module
            for name, value in norm.state_from_moments(moments).items():
                stats[(*path, name)] = value
        return {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}

    def all_ways(
        self,
        parts: Parts,
        variables: Variables,
        data: RunData,
        recompute: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Returns, by split, accuracy and loss with running statistics.

        On the test set, for a normalizer with state, also `accuracy_batch_statistics` and, if asked
        for, `accuracy_recomputed_statistics`.
        """
        eval_size, train_size = parts.config.eval.batch_size, parts.length.batch_size
        metrics = {
            split: self.running(variables, examples, eval_size)
            for split, examples in data.evaluated.items()
        }
        if not parts.norm.stateful:
            return metrics
        test = data.evaluated["test"]
        by_batch = self.batch(variables, test, train_size)
        metrics["test"]["accuracy_batch_statistics"] = by_batch["accuracy"]
        if recompute:
            exact = self.recompute(variables, data.train, train_size)
            by_exact = self.running(exact, test, eval_size)
            metrics["test"]["accuracy_recomputed_statistics"] = by_exact["accuracy"]
        return metrics

    def _fetch(self, data: Examples, rows: Array) -> tuple[Array, Array]:
        images, labels = fetch(data, shard_rows(rows, self.mesh), self.info)
        return shard_rows(images, self.mesh), labels

    def _batches(self, count: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields batches that the devices can split; none larger than there is data."""
        indices, mask = eval_indices(count, splittable(min(batch_size, count), self.mesh))
        return zip(indices, mask, strict=True)

    def _training_batches(
        self, count: int, batch_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields batches of exactly the training's size, so that ghost groups divide them."""
        return zip(*eval_indices(count, batch_size), strict=True)

    def _shuffled(self, count: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the same in one fixed shuffle."""
        order = np.random.default_rng(SHUFFLE_SEED).permutation(count).astype(np.int32)
        return ((order[rows], mask) for rows, mask in self._training_batches(count, batch_size))

    def _total(
        self,
        name: str,
        measure: Callable[..., Any],
        variables: Variables,
        examples: Feed,
        batches: Batches,
    ) -> dict[str, float]:
        sums = []
        for arguments in _arguments(variables, examples, batches):
            sums.append(self.compiler(name, measure, *arguments)(*arguments))
        count = len(examples)
        # Hits are integers and losses are summed in float64: no batch size changes the accuracy.
        return {
            "accuracy": sum(int(part["correct"]) for part in sums) / count,
            "loss": sum(float(part["loss"]) for part in sums) / count,
        }


def by_split(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns {split: {name: value}} as {"split_name": value}."""
    return {f"{split}_{name}": x for split, part in metrics.items() for name, x in part.items()}


def _arguments(variables: Variables, examples: Feed, batches: Batches) -> Iterator[Any]:
    """Yields (variables, data, rows, mask) of each batch."""
    listed = list(batches)
    fed = examples.batches(rows for rows, _ in listed)
    for (data, rows), (_, mask) in zip(fed, listed, strict=True):
        yield variables, data, jnp.asarray(rows), jnp.asarray(mask)


def _count(logits: Array, labels: Array, mask: Array) -> dict[str, Array]:
    loss = jnp.where(mask, cross_entropy(logits, labels), 0.0)
    correct = mask & (jnp.argmax(logits, -1) == labels)
    return {"correct": jnp.sum(correct.astype(jnp.int32)), "loss": jnp.sum(loss)}


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)
