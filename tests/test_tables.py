"""Promise: the published tables come out of the data in every format, each number in its place, never typed."""

import csv
import io
import json
import re
from xml.etree import ElementTree

import pytest
from runs import cell_record, dataset, markdown_rows
from tiny import ROOT

from mixup_recipes.benchmark import tables
from mixup_recipes.benchmark.tables import published_table
from mixup_recipes.benchmark.verdicts import of_cells
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import records

BENCHMARKS = [
    "pytorch_100e", "pytorch_300e", "rsb_a3", "rsb_a2", "deit", "tiny", "cifar10", "cifar100", "cifar100_vit", "cub200",
    "aircraft", "inat2017", "inat2018", "places205",
]  # fmt: skip
with (ROOT / "model_cards/published.csv").open(newline="") as file:
    ROWS = list(csv.DictReader(file))
MARKS = {"own": "", "arxiv": "†", "official": "‡"}
# As the published tables head their columns; one heading per backbone
HEADINGS = {
    "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "resnext101_32x4d": "ResNeXt-101", "efficientnet_b0": "EfficientNet-B0", "mobilenet_v2_1x": "MobileNet.V2 1x",
    "deit_tiny": "DeiT-T", "deit_small": "DeiT-S", "deit_base": "DeiT-B", "pvt_tiny": "PVT-T", "swin_tiny": "Swin-T",
    "convnext_tiny": "ConvNeXt-T", "moganet_tiny": "MogaNet-T", "resnext50_32x4d": "ResNeXt-50",
    "pvt_small": "PVT-S", "wrn28_8": "WRN-28-8",
}  # fmt: skip
TOPS = {"cutmix": [77.0, 77.1, 77.2], "comixup": [70.0, 70.1], "mixup": [76.0]}
RECORDS = {f"r50_100e_{mixer}": cell_record(f"r50_100e_{mixer}", tops) for mixer, tops in TOPS.items()}
RECORDS["r34_100e_gridmix"] = cell_record("r34_100e_gridmix", [74.0])


def as_cells(grid):
    """A parsed grid with a head row as (method, alpha, heading) -> text."""
    (_, _, *headings), *body = grid
    assert all(len(row) == len(headings) + 2 for row in body)
    return {(row[0], row[1], h): text for row in body for h, text in zip(headings, row[2:], strict=True)}


def latex_rows(text):
    """The cells of a LaTeX table, what is bold between stars and marks as they are in Markdown."""
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    for mark, macro in (("†", r"\textsuperscript{\textdagger}"), ("‡", r"\textsuperscript{\textdaggerdbl}")):
        body = body.replace(macro, mark)
    body = re.sub(r"\\textbf\{(.*?)\}", r"**\1**", body)
    return [[cell.strip() for cell in line[:-2].split(" & ")] for line in body.splitlines() if " & " in line]


def page_tables(text):
    """Rows of a page's tables, what is bold between stars, spans behind bars; every tag must be closed in order."""

    def words(e):
        inner = (e.text or "") + "".join(words(child) + (child.tail or "") for child in e)
        return {"span": f"|{inner}", "strong": f"**{inner}**"}.get(e.tag, inner)

    page = ElementTree.fromstring(re.sub("<(meta|br)[^>]*>", "", text))
    return [[[words(cell) for cell in row] for row in table.iter("tr")] for table in page.iter("table")]


PARSERS = {"md": markdown_rows, "latex": latex_rows, "html": lambda text: page_tables(text)[0]}


@pytest.mark.parametrize("fmt", PARSERS)
def test_every_format_carries_every_number_in_its_place_and_the_best_in_bold(fmt):
    numbers = 0
    for benchmark in BENCHMARKS:
        found = as_cells(PARSERS[fmt](published_table(benchmark, {}, fmt)))
        published, columns = {}, {}
        for r in (r for r in ROWS if r["benchmark"] == benchmark):
            heading, top1 = HEADINGS[r["backbone"]], r["top1"]
            heading += f", {load_recipe(r['setting']).epochs} epochs" if benchmark.startswith("cifar") else ""
            published[r["method"], r["alpha"] or "-", heading] = top1 + MARKS[r["source"]] if top1 else "-"
            columns.setdefault(heading, []).append(top1 if r["trained_upstream"] == "yes" else "")
        empty = dict.fromkeys([(m, a, h) for m, a, _ in published for h in columns], "-")
        assert {k: v.replace("*", "") for k, v in found.items()} == empty | published
        bold = {(h, v.rstrip("†‡").strip("*")) for (_, _, h), v in found.items() if "**" in v}
        assert bold == {(heading, max(column)) for heading, column in columns.items()}
        numbers += sum(v != "-" for v in found.values())
    assert numbers == 771


def test_csv_is_one_row_per_cell_with_everything():
    found = list(csv.DictReader(io.StringIO(published_table(None, RECORDS, "csv"))))
    assert len(found) == 828
    for benchmark in BENCHMARKS:
        wanted = [r for r in ROWS if r["benchmark"] == benchmark]
        assert [{k: r[k] for k in wanted[0]} for r in found if r["benchmark"] == benchmark] == wanted
    rows = {r["name"]: r for r in found}
    for name, expected in {
        "r50_100e_cutmix": {
            "our_mean": "77.100", "our_std": "0.100", "our_seeds": "3", "status": "reproduced within the band",
            "protocol": "median of the last 5 epochs", "hours_low": "5.31", "hours_mid": "7.67",  # 7.3 * 1.05 = 7.665
        },
        "r50_100e_comixup": {"status": "off", "mark": "‡"},
        "deit_s_samix": {"status": "published", "our_mean": ""},
        "deit_s_mixpro": {"protocol": "not stated by its source"},
        "r18_100e_deit": {"status": "not run", "top1": ""},
    }.items():  # fmt: skip
        assert rows[name].items() >= expected.items()
    assert "OpenMixup did not train" in rows["r50_100e_comixup"]["status_text"]


def test_our_runs_stand_beside_the_published_number_in_any_format_unless_they_do_not_count_or_are_unfinished():
    found = as_cells(markdown_rows(published_table("pytorch_100e", RECORDS, "md")))
    cell = {(m, h): text for (m, _, h), text in found.items()}
    assert cell.items() >= {
        ("CutMix", "ResNet-50"): "77.17<br>77.10 ± 0.10 (3 seeds)<br>reproduced within the band",
        ("Co-Mixup", "ResNet-50"): "77.60‡<br>70.05 ± 0.07 (2 seeds)<br>off", ("MixUp", "ResNet-34"): "73.97",
        ("MixUp", "ResNet-50"): "77.12<br>76.00 (1 seed)<br>too early to say",
        ("GridMix", "ResNet-34"): "-<br>74.00 (1 seed)<br>run",
    }.items()  # fmt: skip
    shown = as_cells(PARSERS["html"](published_table("pytorch_100e", RECORDS, "html")))
    assert shown["CutMix", "1", "ResNet-50"] == "77.17|77.10 ± 0.10 (3 seeds)|reproduced within the band"
    latex = published_table("pytorch_100e", RECORDS, "latex")
    assert r"77.17 / 77.10 $\pm$ 0.10 (3 seeds) / reproduced within the band" in latex
    for fmt in ("csv", *PARSERS):  # the same data give the same bytes
        assert published_table(None, RECORDS, fmt) == published_table(None, dict(reversed(RECORDS.items())), fmt)
    name, bare = "r50_100e_cutmix", {fmt: published_table("pytorch_100e", {}, fmt) for fmt in PARSERS}
    for changes in (
        {"fields": records.fields_of(load_recipe(name, epochs=90))},
        {"overrides": {"lr": [0.1, 0.2]}},
        {"dataset": dataset(100_000, 50_000)},
        {"images": 49_999},
    ):
        found = {name: cell_record(name, [77.1, 77.3], **changes)}
        assert {fmt: published_table("pytorch_100e", found, fmt) for fmt in PARSERS} == bare
        rows = csv.DictReader(io.StringIO(published_table("pytorch_100e", found, "csv")))
        row = next(r for r in rows if r["name"] == name)
        assert [row[k] for k in ("our_mean", "our_std", "our_seeds", "status")] == ["", "", "0", "published"]
        assert row["status_text"].endswith("do not count")
    begun = {name: cell_record(name, [77.1], epochs=60)}
    assert "| 77.17<br>too early to say |" in published_table("pytorch_100e", begun, "md")


def test_the_caption_names_source_protocol_marks_and_command():
    text = published_table("deit", {}, "md")
    for part in (
        "commit 1fb74ee (2023-08-16)",
        "best epoch, mean of 3 trials (DeiT-T, DeiT-S, PVT-T, Swin-T, MogaNet-T, PVT-S); best epoch, mean of 3 trials, "
        "averaged weights (EMA) (DeiT-B, ConvNeXt-T); TL-Align: not stated by its source; "
        "SMMix (DeiT-T, DeiT-S, DeiT-B, Swin-T, PVT-T): not stated by its source; MixPro: not stated by its source; "
        "LUMix: not stated by its source; MergeMix: not stated by its source.",
        "† method known from an arXiv pre-print, trained by OpenMixup.",
        "‡ result of the method's official code, not trained by OpenMixup.",
        "No runs of ours are recorded",
        "deit_t, deit_s, deit_b, pvt_t, swin_t, convnext_t, moganet_t, pvt_s",
        "`mixup-recipes table --benchmark deit --format md`",
    ):
        assert part in text
    assert "‡" not in published_table("rsb_a3", {}, "md")  # no such mark in that table
    assert "median of the last 10 epochs; AdAutoMix: not" in published_table("tiny", {}, "md")
    assert "Our runs stand beside" not in text and "(4 cells)" in published_table("pytorch_100e", RECORDS, "md")


def test_latex_and_html_are_escaped_balanced_and_self_contained():
    text = published_table(None, RECORDS, "latex")
    one = [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")]
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == one * 14 and text.isascii()
    assert [text.count(rf"\{rule}rule") for rule in ("top", "mid", "bottom")] == [14, 14, 14]
    for line in text.splitlines():
        bare = re.sub(r"\\[&%$#_{}\\]|\\textbackslash\{\}", "", line)  # what is escaped is gone
        assert not re.search("[_#^]|.%", bare)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        if columns := re.match(r"\\begin\{tabular\}\{(\w+)\}", line):
            width = len(columns[1])
        assert "&" not in bare or bare.count("&") == width - 1
    assert tables.tex(r"a_b & 5% ± #{x} ~^\ --flag") == (
        r"a\_b \& 5\% $\pm$ \#\{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} -{}-flag"
    )
    row = ("R&D", "-", [tables.Entry("1.00", "", False, "<x>", "off")])
    text = tables.webpage([tables.Table("a < b", ["<i>"], [row], ["&"], "x > y")])
    assert "<h2>a &lt; b</h2>" in text and "R&amp;D" in text and "<i>" not in text and "<x>" not in text
    assert '<span class="off">off</span>' in text  # the colour says nothing that the text does not
    page = published_table(None, RECORDS, "html")
    assert len(page_tables(page)) == 14 and not re.search("http|<script|<link", page)
    assert all(f".{kind} " in page for kind in tables.CLASSES.values())


def test_the_command_prints_or_writes_the_table_or_explains_bad_input_and_leaves_with_2(console, tmp_path):
    for name, content in RECORDS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    status, out, _ = console("table", "--benchmark", "pytorch_100e", "--results", tmp_path)
    assert status == 0 and out == published_table("pytorch_100e", of_cells(tmp_path), "md", tmp_path)
    assert f"--format md --results {tmp_path}`" in out and "77.10 ± 0.10 (3 seeds)" in out
    (tmp_path / "a\nb").mkdir()
    assert f"--format md --results {tmp_path}/a b`" in console("table", "--results", tmp_path / "a\nb")[1]
    path = tmp_path / "table.tex"
    assert console("table", "--format", "latex", "--out", path)[:2] == (0, f"{path}\n")
    assert path.read_text() == published_table(None, of_cells(), "latex")
    for argv, says in (
        (["--benchmark", "diet"], "unknown benchmark 'diet'; did you mean 'deit'?"),
        (["--results", "/nowhere"], "no folder of run records /nowhere"),
    ):
        assert console("table", *argv, "--out", tmp_path / "new") == (2, "", f"error: {says}\n")
    assert not (tmp_path / "new").exists()
    status, out, err = console("table", "--format", "latx")
    assert (status, out) == (2, "") and all(kind in err for kind in ("latx", "md", "csv", "latex", "html"))
