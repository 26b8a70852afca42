"""The pages of the reference, made from docstrings, dataclasses and the help of the commands.

Python files are read and not run, so that no page needs torch. The text is MyST: Markdown with Sphinx's directives, so
that each name can be linked and found.
"""

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import evaluate_mixup
import mixers
import mixup_recipes
from mixers import MIXERS, REGRESSION
from mixup_recipes.cli import app
from mixup_recipes.flags import limits_of
from mixup_recipes.pages.methods import markdown
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.training.job import Job

ROOT = Path(__file__).parents[1]
PACKAGES = {"mixers": Path(mixers.__file__).parent, "mixup_recipes": Path(mixup_recipes.__file__).parent}
Definition = ast.ClassDef | ast.FunctionDef

PYTHON: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "mixers": (
        "Mixers",
        "`build` makes a mixer by its name. `Mixer` is the contract that every method follows. [A mixer in your own "
        "loop](../mixers.md) shows how to use them, and [Methods](methods.md) lists the arguments of each method.",
        (
            "mixers.registry:build", "mixers.registry:signature", "mixers.registry:docstring", "mixers.base:Mixer",
            "mixers.base:Out", "mixers.base:Step", "mixers.compose:Switch", "mixers.testing.contract:check_mixer",
        ),
    ),
    "adapters": (
        "Other loops and other targets",
        "`mixers.adapters` puts a mixer into the loop of another library: [one mixer, every loop](../loops.md) has a "
        "script for each. `mixers.dense` mixes masks and boxes: [more than class labels](../dense.md).",
        (
            "mixers.adapters:mix_batch", "mixers.adapters:Mixed", "mixers.adapters:BatchMixer",
            "mixers.adapters:MixCollate", "mixers.adapters:TrainerMixin", "mixers.adapters:LightningMixin",
            "mixers.adapters:cross_entropy", "mixers.adapters:dense_targets", "mixers.adapters:soft_cross_entropy",
            "mixers.dense:mix_like", "mixers.dense:mix_boxes", "mixers.dense:Boxes",
        ),
    ),
    "taps": (
        "Looking into a model",
        "What a method may see of a model that is not ours: its stages, hidden features, attention and the gradient of "
        "its input. [Methods that look at the model](../learned.md) has an example. All names are in `mixers.taps`.",
        (
            "mixers.taps.published:stages", "mixers.taps.published:classifier", "mixers.taps.hooks:record",
            "mixers.taps.hooks:edit", "mixers.taps.attending:attention", "mixers.taps.attending:attention_layers",
            "mixers.taps.attending:Attention", "mixers.taps.gradient:saliency", "mixers.taps.features:to_map",
            "mixers.taps.features:to_tokens", "mixers.taps.features:from_tokens", "mixers.taps.merging:merging",
            "mixers.taps.teacher:pretrained", "mixers.taps.teacher:Frozen",
        ),
    ),
    "runs": (
        "Recipes and runs in Python",
        "`resolve` makes a recipe from a name. `Run.open` reads a run folder, and `compare` pairs runs on the same "
        "images. [Results](../results.md) shows the commands that do the same.",
        (
            "mixup_recipes.resolve:settings", "mixup_recipes.resolve:resolve", "mixup_recipes.resolve:load_recipe",
            "mixup_recipes.typed:UserError", "mixup_recipes.runs.run:Run", "mixup_recipes.runs.run:Data",
            "mixup_recipes.runs.run:Summary", "mixup_recipes.runs.log:Rows", "mixup_recipes.runs.log:TrainRow",
            "mixup_recipes.runs.log:ValRow", "mixup_recipes.runs.log:read_rows", "mixup_recipes.runs.compare:compare",
            "mixup_recipes.runs.compare:Comparison",
        ),
    ),
    "robustness": (
        "Robustness in Python",
        "Pure functions for the corruptions, attacks and occlusions that [the suite](../robustness.md) measures.",
        (
            "mixup_recipes.robustness.corruptions:corrupt", "mixup_recipes.robustness.corruptions:mce",
            "mixup_recipes.robustness.attacks:fgsm", "mixup_recipes.robustness.attacks:pgd",
            "mixup_recipes.robustness.occlusion:occlude",
        ),
    ),
}  # fmt: skip
"""Page -> its title, its first paragraph, and what it documents, as ``"module:name"``."""
SHOWN_AS = {
    "mixers.registry": "mixers", "mixers.base": "mixers", "mixers.compose": "mixers",
    "mixers.testing.contract": "mixers.testing",
}  # fmt: skip
"""Module -> where its names are imported from."""


def pages() -> dict[str, str]:
    """Every page of the reference: its name, and its text in MyST."""
    made = {"index": index(), "commands": commands(), "recipe": recipe(), "job": job(), "methods": methods()}
    for name, (title, about, addresses) in PYTHON.items():
        made[name] = "\n\n".join([f"# {title}", about, *(documented(address) for address in addresses)]) + "\n"
    return made


ORDER = ("commands", "recipe", "job", *PYTHON, "methods")
"""The pages behind the index, in the order of the navigation."""


def index() -> str:
    """The first page."""
    listed = "\n".join(f"- [](./{name}.md)" for name in ORDER)
    return (
        "# Reference\n\nThese pages are generated from docstrings, dataclasses and the help of the commands.\n\n"
        f"{listed}\n\n```{{toctree}}\n:hidden:\n\n" + "\n".join(ORDER) + "\n```\n"
    )


# ------------------------------------------------------------------------------------------------ commands and fields


def commands() -> str:
    """Every command with its help, as cyclopts writes it."""
    text = app.generate_docs(output_format="markdown")
    text = re.sub(r"## Table of Contents\n.*?(?=\*\*Commands\*\*)", "", text, count=1, flags=re.S)
    text = text.replace("# mixup-recipes\n", "# The command line\n", 1)
    text = re.sub(r"^(#+) mixup-recipes (.+)$", r"\1 \2", text, flags=re.M)
    text = re.sub(r"\(#mixup-recipes-([\w-]+)\)", anchored, text)
    text = re.sub(r"^```console$", "```text", text, flags=re.M)
    fields = r"(\*\*Recipe fields\*\*:\n\n).*?(?=^#)"
    text, found = re.subn(
        fields, r"\1Each field of [the recipe](recipe.md) is a flag too.\n\n", text, flags=re.M | re.S
    )
    if found != 1:
        raise ValueError(f"expected the fields of a recipe in the help of one command, found them in {found}")
    return text.rstrip() + "\n"


def anchored(link: re.Match[str]) -> str:
    """A link to the heading of a command, whose name is the whole heading."""
    return f"(#{'install-completion' if link[1].endswith('install-completion') else link[1]})"


def recipe() -> str:
    """All fields of a recipe, by the parts of its class."""
    start = (
        "# Recipe\n\nA recipe decides the result of a run. A setting is a YAML file that assigns these fields, and "
        "each field is a flag of the training command. `mixup-recipes recipes explain NAME` prints the fields of one "
        "recipe with the origin of each value.\n\n```{py:class} Recipe\n:module: mixup_recipes.recipe\n```\n"
    )
    return start + fields(Recipe, MODULE[Recipe])


def job() -> str:
    """All fields of a training job and of an evaluation."""
    start = (
        "# Job\n\nThese flags say where and how a recipe runs. They never change its result. The commands are "
        "`mixup-recipes train` and `train_mixup.py`.\n\n```{py:class} Job\n:module: mixup_recipes.training.job\n```\n"
    )
    evaluation = (
        "\n## Evaluation\n\nThe flags of `mixup-recipes evaluate` and `evaluate_mixup.py`.\n\n"
        "```{py:class} Evaluation\n:module: evaluate_mixup\n```\n"
    )
    own, other = fields(Job, MODULE[Job]), fields(evaluate_mixup.Evaluation, MODULE[evaluate_mixup.Evaluation])
    return start + own + evaluation + other


MODULE: dict[type, str] = {
    Recipe: "mixup_recipes.recipe",
    Job: "mixup_recipes.training.job",
    evaluate_mixup.Evaluation: "evaluate_mixup",
}
"""Class -> the module that it stands in, also where that runs as a script."""


def fields(cls: type, module: str) -> str:
    """The fields of a dataclass with type, default, text and range; a comment ``# --- data`` begins a part."""
    source = source_of(module)
    node = definition(module, cls.__name__)
    given = {field.name: field for field in dataclasses.fields(cls)}
    parts = {
        number: found[1]
        for number, line in enumerate(source.splitlines(), 1)
        if node.lineno < number <= (node.end_lineno or 0) and (found := re.match(r" +# --- (.+)", line))
    }
    texts, pending = [], sorted(parts)
    for name, (line, doc) in documented_fields(node).items():
        while pending and pending[0] < line:
            title = parts[pending.pop(0)]
            texts.append(f"## {title[:1].upper()}{title[1:]}")
        kind, default = schema(cls)[name], given[name].default
        options = {"type": type_of(kind)}
        if default is not dataclasses.MISSING and default != "":
            options["value"] = repr(default)
        limits = limits_of(kind)
        more = f"\n\nValues: {limits.removesuffix(' or none')}." if limits.removesuffix("or none").strip() else ""
        texts.append(directive("attribute", module, f"{cls.__name__}.{name}", f"{prose(doc)}{more}", options))
    return "\n" + "\n\n".join(texts) + "\n"


def type_of(kind: Any) -> str:
    """A type as an annotation without its range."""
    text = re.sub(r"typing\.|pathlib\.|<class '(\w+)'>", lambda found: found[1] or "", shown(kind))
    return re.sub(r"\bNoneType\b", "None", text)


def shown(kind: Any) -> str:
    """An annotation in words of Python; choices are their values."""
    if hasattr(kind, "__metadata__"):
        return shown(kind.__origin__)
    arguments = getattr(kind, "__args__", ())
    if "Literal" in str(getattr(kind, "__origin__", "")):
        return " | ".join(map(repr, arguments))
    if type(kind).__name__ in ("UnionType", "Union", "_UnionGenericAlias"):
        return " | ".join(map(shown, arguments))
    if arguments:
        return f"{kind.__origin__.__name__}[{', '.join('...' if a is ... else shown(a) for a in arguments)}]"
    return getattr(kind, "__name__", str(kind))


# --------------------------------------------------------------------------------------------------------- Python code


def methods() -> str:
    """The signature and the text of what each name in ``MIXERS`` and ``REGRESSION`` builds."""
    texts = [
        "# Methods",
        "What each name of a method builds, with its arguments. The names are those of `build` and of recipes. Each "
        "method has [a page of its own](../methods/index.md).",
    ]
    for name, row in (MIXERS | REGRESSION).rows.items():
        if isinstance(row, str):
            file, _, what = row.partition(":")
            page = f"[The page of {name}](../methods/{name}.md)"
            text = entry(f"mixers.{file}", what, members=False, after=f"Built by `build({name!r})`. {page}.")
            texts.append(f"## {name}\n\n{text}")
    return "\n\n".join(texts) + "\n"


def documented(address: str) -> str:
    """A class with its members, or a function. ``address``: ``"module:name"``."""
    module, _, name = address.partition(":")
    node = definition(module, name)
    public = SHOWN_AS.get(module, module.rpartition(".")[0] if module.startswith("mixers.taps.") else module)
    return f"## {name}\n\n{entry(module, node.name, public)}"


def entry(module: str, name: str, public: str = "", members: bool = True, after: str = "") -> str:
    """One class or function as a directive. ``public``: the module to name; ``after``: more text."""
    node, public = definition(module, name), public or module
    text = "\n\n".join(part for part in (prose(ast.get_docstring(node) or ""), after) if part)
    if isinstance(node, ast.FunctionDef):
        return directive("function", public, name + call(node), text)
    inner = [member(public, name, part) for part in node.body if isinstance(part, ast.FunctionDef)] if members else []
    attributes = [
        directive("attribute", public, f"{name}.{field}", prose(doc), {"type": ast.unparse(kind)})
        for field, (_, doc, kind) in annotated(node).items()
        if members and not field.startswith("_")
    ]
    body = "\n\n".join(part for part in (text, *attributes, *inner) if part)
    return directive("class", public, name + constructor(node), body, colons=5)


def member(public: str, owner: str, node: ast.FunctionDef) -> str:
    """A method or property of a class; nothing for what is private or says nothing."""
    doc = ast.get_docstring(node)
    if node.name.startswith("_") or not doc:
        return ""
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    name = f"{owner}.{node.name}"
    if any("property" in mark for mark in marks):
        kind = {"type": ast.unparse(node.returns)} if node.returns else {}
        return directive("property", public, name, prose(doc), kind)
    options = {mark: "" for mark in sorted(marks & {"classmethod", "staticmethod"})}
    return directive("method", public, name + call(node, "staticmethod" not in marks), prose(doc), options)


def directive(
    kind: str, module: str, head: str, text: str, options: dict[str, str] | None = None, colons: int = 3
) -> str:
    """A directive of Sphinx's Python domain. ``colons``: more of them for what has others within."""
    given = {"module": module} | (options or {})
    lines = [f":{name}: {json.dumps(value) if value else ''}".rstrip() for name, value in given.items()]
    return "\n".join([f"{':' * colons}{{py:{kind}}} {head}", *lines, "", text, ":" * colons])


def constructor(node: ast.ClassDef) -> str:
    """The arguments of a class, where its own file says them."""
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    return call(made).partition(" -> ")[0] if made else ""


def call(node: ast.FunctionDef, bound: bool | None = None) -> str:
    """The arguments and the result of a function. ``bound``: leave out the first argument; by default ``self``."""
    given = node.args
    if given.args and (bound or (bound is None and given.args[0].arg == "self")):
        given = ast.arguments(given.posonlyargs, given.args[1:], given.vararg, given.kwonlyargs, given.kw_defaults,
                              given.kwarg, given.defaults)  # fmt: skip
    return f"({ast.unparse(given)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def annotated(node: ast.ClassDef) -> dict[str, tuple[int, str, ast.expr]]:
    """The annotated names in the body of a class: line, the docstring behind it, annotation."""
    found = {}
    for part, behind in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            said = behind.value if isinstance(behind, ast.Expr) else None
            doc = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
            found[part.target.id] = (part.lineno, inspect.cleandoc(doc), part.annotation)
    return found


def documented_fields(node: Definition) -> dict[str, tuple[int, str]]:
    """The fields of a dataclass: line, docstring."""
    assert isinstance(node, ast.ClassDef)
    return {name: (line, doc) for name, (line, doc, _) in annotated(node).items()}


def definition(module: str, name: str) -> Definition:
    """A class or function of a module. Raises ``ValueError`` where there is none of this name."""
    found = (n for n in ast.parse(source_of(module)).body if isinstance(n, ast.ClassDef | ast.FunctionDef))
    node = next((n for n in found if n.name == name), None)
    if node is None:
        raise ValueError(f"{module} has no class or function {name!r}: mend website/reference.py")
    return node


def source_of(module: str) -> str:
    """The text of a module of this repository."""
    package, _, rest = module.partition(".")
    path = PACKAGES[package] / rest.replace(".", "/") if package in PACKAGES else ROOT / package
    return path.with_suffix(".py").read_text(encoding="utf-8")


def prose(doc: str) -> str:
    """A docstring as Markdown; a table of reStructuredText is kept as it is drawn."""
    parts = [textwrap.indent(part, "    ") if re.match(r"=+ ", part) else markdown(part) for part in doc.split("\n\n")]
    return "\n\n".join(parts)
