"""Looks into a model that is not ours: its stages, hidden features, attention and input gradient, and a frozen teacher.

Everything works on plain timm models from outside, through the module paths that timm publishes in ``feature_info``. It
leaves no trace on the model: no hook, mode, flag, buffer or gradient. A tap that did not fire raises an error.
Otherwise a hook on a model that was compiled as a whole, or that recomputes activations, would be ignored without a
word.

Two limits of torch decide what is possible. Inside a stage that was compiled no new hook fires, so a tap there runs
that one stage uncompiled during its block. Activation checkpointing runs a module again in the backward pass, when
hooks are gone. So ``edit`` refuses it. ``record``, ``attention`` and ``saliency`` work where it reaches the module at
all.
"""

from ..weights import NoWeights
from .attending import Attention, ahead, attention, attention_layers, attentions
from .features import before_classifier, channel_axis, from_tokens, grid, last_feature, to_map, to_tokens
from .gradient import as_is, clean_pass, evaluating, looking, magnitude, saliency
from .hooks import edit, entering, record
from .merging import merging, merging_blocks
from .published import classifier, compile_stages, early_stages, first_convolution, parts, reductions, stages
from .teacher import PLACES, Frozen, asking_once, fingerprint, pretrained, teachers, why

__all__ = [
    "PLACES",
    "Attention",
    "Frozen",
    "NoWeights",
    "ahead",
    "as_is",
    "asking_once",
    "attention",
    "attention_layers",
    "attentions",
    "before_classifier",
    "channel_axis",
    "classifier",
    "clean_pass",
    "compile_stages",
    "early_stages",
    "edit",
    "entering",
    "evaluating",
    "fingerprint",
    "first_convolution",
    "from_tokens",
    "grid",
    "last_feature",
    "looking",
    "magnitude",
    "merging",
    "merging_blocks",
    "parts",
    "pretrained",
    "record",
    "reductions",
    "saliency",
    "stages",
    "teachers",
    "to_map",
    "to_tokens",
    "why",
]
