"""Which tensors of a weight file are a model's, whatever wrapped the model when it was saved.

timm's checkpoints hold ``state_dict`` and ``state_dict_ema``. DDP, torch.compile, Lightning and others put prefixes
before the names. OpenMixup's checkpoints hold ``backbone.`` and ``head.``; those of AutoMix and its kin a momentum
encoder and a model, ``backbone_k.`` and ``backbone_q.``, with a head for mixed and one for clean images each,
``head_mix_k.``, ``head_one_k.``, ... OpenMixup names the layers of a ResNet as timm does; those of a vision transformer
and of ConvNeXt have other names and are the same tensor by tensor.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixup_recipes.typed import UserError

State = dict[str, Tensor]

# In the order of ``timm.models.load_state_dict``: a run of timm that has an average reports the average.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
DEEPEST = 3  # containers inside containers

# By a name that tells the family: OpenMixup's names of layers, and timm's, or those that timm converts.
RENAMED = {
    "layers.0.ln1.weight": (  # vision transformers: what OpenMixup's own converter from timm does, backwards
        (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^layers\.", "blocks."), (r"^ln1\.", "norm."),
        (r"\.ln(\d)\.", r".norm\1."), (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ),
    "stages.0.0.depthwise_conv.weight": (  # ConvNeXt: back to the names of its first publication
        (r"\.depthwise_conv\.", ".dwconv."), (r"\.pointwise_conv(\d)\.", r".pwconv\1."), (r"^norm3\.", "norm."),
    ),
}  # fmt: skip


class Chosen(NamedTuple):
    """The tensors of a file that may be the model's, under the names that timm has for them."""

    body: State
    head: State
    """The classifier of OpenMixup, which stands apart from the body; empty where the body holds it."""
    left: list[str]
    """Names of tensors that are certainly not."""
    notes: list[str]
    """What was taken where there was a choice."""


def printable(name: str) -> str:
    """A name that a file chose, in a line of text."""
    return "".join(c if c.isprintable() else "?" for c in name[:100])


def few(names: Iterable[str]) -> str:
    """How many names there are, and the first three."""
    found = list(map(printable, names))
    return f"{len(found)} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"


def contained(content: Any, where: str) -> tuple[State, list[str]]:
    """The state dict in what a file holds, and a note where it holds several. ``where``: the file."""
    notes = []
    for _ in range(DEEPEST):
        inside = content if isinstance(content, dict) else {}
        tables = [name for name in CONTAINERS if isinstance(inside.get(name), dict) and inside[name]]
        if not tables:
            break
        if len(tables) > 1:
            notes.append(f"has several state dicts: {tables[0]} is used, not {' or '.join(tables[1:])}")
        content = inside[tables[0]]
    table = content if isinstance(content, dict) else {}
    state = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        what = f"{few(map(str, table))} of other things" if table else f"a {type(content).__name__}"
        raise UserError(
            f"{where} holds no state dict, neither by itself nor under {', '.join(CONTAINERS)}; it holds {what}"
        )
    return state, notes


def choose(state: State, model: nn.Module, heads: tuple[str, ...]) -> Chosen:
    """The tensors of a state dict that may be ``model``'s. ``heads``: the names of its classifiers."""
    own = set(model.state_dict())
    tops = set(grouped(own))
    state = unwrapped({k.replace("_orig_mod.", ""): v for k, v in state.items()}, tops)  # torch.compile, of parts too
    groups = {top: below(state, names) for top, names in grouped(state).items()}
    bodies = {top: unwrapped(body, tops) for top, body in groups.items() if top not in tops}
    notes, head = [], State()
    if {"backbone_k", "backbone_q"} <= bodies.keys():  # AutoMix: what a run of it here exports at its root
        notes.append("has several models: backbone_k and head_mix_k are used")
        body, head = bodies["backbone_k"], classifier(groups.get("head_mix_k", {}), heads)
    elif "backbone" in bodies:
        body, head = bodies["backbone"], classifier(groups.get("head", {}), heads)
    else:
        bodies[""] = state
        fits = {top: len(own & body.keys()) for top, body in bodies.items()}
        best = max(fits, key=lambda top: (fits[top], fits[top] > 0 and "ema" in top, not top))
        rivals = [top or "the names without it" for top in fits if fits[top] == fits[best] and top != best]
        notes += (
            [f"has several models: {printable(best)} is used, not {' or '.join(map(printable, rivals))}"]
            if best and rivals
            else []
        )
        body = bodies[best]
    taken = {id(value) for value in (*body.values(), *head.values())}
    left = [k for k, value in state.items() if id(value) not in taken]
    return Chosen(renamed(body), head, left, notes)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their part before the first dot."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return groups


def below(state: State, names: Iterable[str]) -> State:
    """Tensors of some names, without the part before the first dot; a name without a dot has nothing below."""
    return {name.partition(".")[2]: state[name] for name in names if "." in name}


def unwrapped(state: State, tops: set[str]) -> State:
    """Without the prefixes that all names share. ``tops``: first parts of the model's own names, which stay."""
    while len(groups := grouped(state)) == 1 and not groups.keys() & tops and all("." in name for name in state):
        state = below(state, state)
    return state


def classifier(head: State, heads: tuple[str, ...]) -> State:
    """The one linear layer of a head, as the model's classifier; empty where a head has several, or none."""
    linear = [k for k, v in head.items() if re.search(r"(^|\.)weight$", k) and v.ndim == 2]
    if not len(linear) == len(heads) == 1:
        return {}
    place = linear[0].removesuffix("weight")
    return {f"{heads[0]}.{kind}": head[place + kind] for kind in ("weight", "bias") if place + kind in head}


def renamed(state: State) -> State:
    """Tensors by timm's names, where OpenMixup has others; see ``RENAMED``."""
    rules = next((rules for name, rules in RENAMED.items() if name in state), ())
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def converted(state: State, model: nn.Module) -> State:
    """What timm makes of the weights that its models were first published with. Raises what timm does."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else dict(convert(dict(state), model))
