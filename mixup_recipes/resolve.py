"""From a name to a recipe.

A setting is a YAML file in ``recipes/``. A recipe name is ``<setting>_<mixer>``, for example ``r50_100e_cutmix``; the
longest setting name that fits wins. Precedence: defaults, ``base``, file, command line. A file assigns fields of
``Recipe``; beside them it may name one ``base`` setting, and hold a table ``per_mixer`` of the fields that the setting
changes for one mixer only (mixer -> fields, ahead of the file's other fields).
"""

import copy
import difflib
import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mixers import MIXERS
from mixup_recipes.files import shipped
from mixup_recipes.mixer_args import check_mixer_name, check_rows, merge_rows, with_mixer_args
from mixup_recipes.names import meant_setting, setting_and_mixer
from mixup_recipes.recipe import BINARY, MULTI_LABEL, Recipe, check, schema
from mixup_recipes.typed import UserError, convert, from_yaml, nearest

FOLDER = shipped("recipes")


def settings() -> dict[str, Path]:
    """All settings in this folder, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"), key=str)}  # paths compare slowly


def split_name(name: str) -> tuple[str, str | None]:
    """``"r50_100e_cutmix"`` to ``("r50_100e", "cutmix")``: the longest setting name that fits; no mixer: None."""
    fits = [s for s in settings() if name == s or name.startswith(s + "_")]
    if not fits or name.endswith("_"):
        raise UserError(unknown(name))
    setting = max(fits, key=len)
    return setting, name[len(setting) + 1 :] or None


def unknown(name: str) -> str:
    """An error message: which part of a recipe's name is none, and the recipe that is spelled most alike or meant."""
    names = [*settings(), *(f"{s}_{m}" for s in settings() for m in MIXERS)]
    head, mixer = setting_and_mixer(name, MIXERS)
    words = {s: {*s.split("_"), f"{r[0].epochs}e"} for s in settings() if (r := shipped_recipe(s))}
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
        advice = f"did you mean {close[0]!r}?"
    elif setting := meant_setting(head, words):
        advice = f"did you mean {f'{setting}_{mixer}' if mixer else setting!r}?"
    elif mixer or not (advice := nearest(name, names)).startswith("did you mean"):
        advice = f"valid settings: {', '.join(settings()) or 'none'}; a recipe is <setting>_<mixer>"
    if mixer and name.endswith(mixer):
        head = name.removesuffix(mixer)[:-1]
        return f"recipe {name!r} has a known mixer, {mixer!r}, and an unknown setting, {head!r}; {advice}"
    return f"unknown recipe {name!r}: no setting starts it; {advice}"


def read_yaml(path: Path, what: str = "recipe file") -> dict[str, Any]:
    """A YAML file that holds a table, with readable errors."""
    try:
        content = copy.deepcopy(parsed(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise UserError(f"cannot read {what} {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not valid YAML: {e}") from None
    except UserError as e:
        raise UserError(f"{path} is {e}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {what} must be a table of names and values, got {type(content).__name__}")
    return content


parsed = functools.lru_cache(256)(from_yaml)  # a base is read for each of its settings


def resolve(
    name: str, overrides: dict[str, Any] | None = None, absent: Collection[str] = ()
) -> tuple[Recipe, dict[str, str]]:
    """The recipe behind a name or a file, and the origin of every value.

    ``name``: ``<setting>_<mixer>``, a setting alone, or the path of a YAML file. ``overrides``: field -> value,
    typed or text; the key ``mixer_args`` updates the arguments of the chosen mixer. ``absent``: mixers that are not
    installed here, whose arguments in the file of a run are complete and are taken as they are.
    Raises ``UserError`` with the nearest valid name before anything is touched.
    """
    is_file = name.endswith((".yaml", ".yml")) or "/" in name
    setting, mixer = (name, None) if is_file else split_name(name)
    path = Path(name) if is_file else settings()[setting]
    if mixer is not None:
        check_mixer_name(mixer, f"recipe {name!r} has a known setting, {setting!r}, and an ")
    files = [(path.name, read_yaml(path))]
    if "base" in files[0][1]:
        base = files[0][1].pop("base")
        if not isinstance(base, str) or base not in settings():
            raise UserError(f"{path.name}: unknown base {base!r}; {nearest(str(base), settings())}")
        below = read_yaml(settings()[base])
        if "base" in below:
            raise UserError(f"{path.name}: base {base!r} has a base of its own; bases are not chained")
        files.insert(0, (f"{base}.yaml", below))
    overrides = dict(overrides or {})
    own_args = overrides.pop("mixer_args", {})
    given = [content.get("mixer") for _, content in files] + [mixer, overrides.get("mixer")]
    chosen = next((str(m) for m in reversed(given) if m is not None), "vanilla")

    layers: list[tuple[str, dict[str, Any]]] = []
    for source, content in files:
        rows = content.pop("per_mixer", {})
        layers.append((source, content))
        layers += [(f"{source}: per_mixer.{m}", fields) for m, fields in per_mixer(rows, source) if m == chosen]
    layers += [("recipe name", {"mixer": mixer})] * (mixer is not None) + [("command line", overrides)]
    own = is_file and any("mixer_args" in layer for source, layer in layers if source.startswith(path.name))
    known = schema(Recipe)
    values: dict[str, Any] = {}
    origin = dict.fromkeys(known, "default")
    for source, layer in layers:
        if layer.get("dataset") not in (None, values.get("dataset")) and values and "num_classes" not in layer:
            values["num_classes"], origin["num_classes"] = 0, "the data"
        for key, value in layer.items():
            converted = field_value(key, value, source, absent)
            if key == "mixer_args":
                converted = merge_rows(values.get(key, {}), converted, source, origin)
            values[key] = converted
            origin[key] = source
        if "multi_label" in layer and values["multi_label"]:
            own_loss = values.get("loss", "ce") in BINARY
            for key in {*MULTI_LABEL} - {*layer} - ({"loss"} if own_loss else set()):
                values[key], origin[key] = MULTI_LABEL[key], "multi_label"
    if not is_file or not values.get("name"):
        values["name"] = f"{setting}_{chosen}" if not is_file else path.stem
    recipe = with_mixer_args(Recipe(**values), own_args, origin, not own, absent)
    check(recipe)
    return recipe, origin


@functools.cache
def shipped_recipe(name: str) -> tuple[Recipe, dict[str, str]] | None:
    """This package's recipe of a name and the origin of its values, resolved once; None if it has none."""
    known = settings()
    if not re.fullmatch(r"\w+", name, re.ASCII) or not any(f"{name}_".startswith(f"{s}_") for s in known):
        return None  # a path, whose file would be read, or the name of a stranger's file
    try:
        return resolve(name)
    except UserError:  # no such recipe, although its name may begin like a setting's
        return None


def load_recipe(name: str, **overrides: Any) -> Recipe:
    """The recipe behind a name or a file: ``load_recipe("r50_100e_cutmix", epochs=2)``. See ``resolve``."""
    return resolve(name, overrides)[0]


def field_value(key: str, value: Any, source: str, absent: Collection[str] = ()) -> Any:
    """A value as its field's type. Raises ``UserError`` for an unknown field or a wrong value."""
    known = schema(Recipe)
    if key not in known:
        raise UserError(f"{source}: unknown recipe field {key!r}; {nearest(str(key), known)}")
    converted = convert(value, known[key], f"{source}: {key}")
    if key == "mixer_args":
        check_rows(converted, source, absent)
    return converted


def per_mixer(rows: Any, source: str) -> list[tuple[str, dict[str, Any]]]:
    """The ``per_mixer`` table of a file, checked whole: a typo in a row is found whichever mixer is chosen."""
    if not isinstance(rows, dict) or not all(isinstance(fields, dict) for fields in rows.values()):
        raise UserError(f"{source}: per_mixer: expected a table of mixer -> fields")
    for row, fields in rows.items():
        check_mixer_name(row, f"{source}: per_mixer: ")
        for key, value in fields.items():
            if key in ("name", "mixer"):
                raise UserError(f"{source}: per_mixer.{row} cannot set {key}")
            field_value(key, value, f"{source}: per_mixer.{row}")
    return list(rows.items())
