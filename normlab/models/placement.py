"""Placement: which normalizer stands where in a model (`config.norm_overrides`).

An override is a text `pattern=kind`, e.g. `norm_stem=none` or `stage1_*=layer_norm`. The pattern is
a shell's (`*`, `?`, `[abc]`; `*` goes past `/`) and fits whole paths as `normlab inspect` lists
them; where several fit, the last one holds. The fields of the kind have the defaults of its class.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from flax import linen as nn

from normlab.errors import UserError, unknown
from normlab.models.layers import norm_layers
from normlab.norms import NORMS


def parse_overrides(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (pattern, kind) of each text; raises UserError for another form or kind."""
    found = []
    for text in texts:
        pattern, equals, kind = (part.strip() for part in text.partition("="))
        if not pattern or not equals or not kind:
            raise UserError(
                f"config field 'norm_overrides' has {text!r}, which is not pattern=kind"
            )
        if kind not in NORMS:
            raise unknown("norm in 'norm_overrides'", kind, NORMS)
        found.append((pattern, kind))
    return found


def check_overrides(model: nn.Module, image_shape: tuple[int, ...], texts: Sequence[str]) -> None:
    """Raises UserError, with the nearest path, for a pattern that fits no normalizer of `model`."""
    if not texts:
        return
    paths = [layer.path for layer in norm_layers(model, image_shape)]
    for pattern, _ in parse_overrides(texts):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise unknown("normalizer in 'norm_overrides'", pattern, paths)
