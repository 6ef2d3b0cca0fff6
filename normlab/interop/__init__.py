"""Parameters, state and settings of normalizers to and from other frameworks.

`pytorch`, `keras`, `linen` (flax.linen) and `haiku` have the same four functions, all pure:

    norm_variables(kind, theirs) -> variables      norm_state(kind, variables) -> theirs
    norm_fields(kind, arguments) -> fields         norm_arguments(kind, fields, shape) -> arguments

`kind` is the config name (`batch_norm`); `variables` what `NORMS[kind](**fields)` has, as numpy
arrays; `theirs` what the framework keeps, as a mapping of what numpy can convert (of Haiku two, and
a module's name); `arguments` the keywords of the framework's constructor, where what is absent has
that framework's default; `shape` (..., C) an example's. No framework is imported here but flax,
which is ours too, and no array of one is shared with the other. Each module says what cannot be
carried over. What does not fit is a UserError, one line, that names the entry.

Whole models: `pytorch.resnet_variables` and back for torchvision's ResNets, and to be imported by
name, since they need the models, `deepmind_nfnets` and `timm` for published normalizer-free nets.
"""

from normlab.interop import haiku, keras, linen, pytorch

__all__ = ["haiku", "keras", "linen", "pytorch"]
