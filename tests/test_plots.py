"""Promise: plots show what the runs logged, the same bytes each time, and compare only like with like."""

import itertools
import statistics

import matplotlib
import numpy as np
import pytest
from marks import slow_unless
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from runs import ENV, make_run, quick

from mixup_recipes.pages import plots
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import grouped
from mixup_recipes.typed import UserError

KINDS = {"curves": plots.curves, "cost": plots.cost, "dots": plots.dots}


@pytest.fixture(autouse=True)
def style():
    """Figures that a test makes look as in a file."""
    with matplotlib.rc_context(plots.STYLE):
        yield


@pytest.fixture
def run(tmp_path):
    """A run of ``epochs`` epochs, three of them planned, that gain 10 each and would end with the given top-1."""

    def make(mixer, top1, speed=100.0, seed=0, epochs=3, env=ENV, **fields):
        name = "-".join(map(str, (mixer, seed, *fields.values(), speed, top1, epochs)))
        recipe = quick(mixer, **{"epochs": 3, "protocol_epochs": 1, "seed": seed} | fields)
        values = [max(0.0, top1 - 10 * left) for left in (2, 1, 0)][:epochs]
        return Run.open(make_run(tmp_path / "runs" / name, recipe, values, speed=speed, env=env))

    return make


@pytest.fixture
def runs(run):
    """Three mixers, two seeds each."""
    found = itertools.product((("vanilla", 50.0, 200.0), ("mixup", 54.0, 100.0), ("cutmix", 53.0, 80.0)), (0, 1))
    return [run(mixer, top1 + 2 * seed, speed, seed) for (mixer, top1, speed), seed in found]


EACH = [(suffix, kind) for suffix in ("png", "svg") for kind in KINDS]


@pytest.mark.parametrize(("suffix", "kind"), slow_unless(lambda case: case in EACH[::3], EACH))
def test_equal_runs_give_equal_bytes_and_others_give_others(kind, suffix, runs, run, console, tmp_path, monkeypatch):
    one, two, three = (tmp_path / f"{name}.{suffix}" for name in ("one", "two", "new/three"))
    KINDS[kind](runs, one)
    monkeypatch.setattr(matplotlib, "__version__", "99")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # another day
    assert console("plot", kind, *(run.folder for run in runs), "--out", two) == (0, "", "")
    assert one.read_bytes() == two.read_bytes()
    KINDS[kind]([run("vanilla", 51.5, 200.0), *runs[1:]], three)
    assert one.read_bytes() != three.read_bytes()
    assert not any(word in one.read_bytes() for word in (b"dc:date", b"Software", b"Creation Time", b"Matplotlib v"))
    written = sorted(p.name for p in tmp_path.rglob("*.*") if "runs" not in p.parts)
    assert written == sorted(p.name for p in (one, two, three))  # nothing half-written is left
    for colour in plots.COLOURS[:3]:  # every recipe has left its own
        if suffix == "svg":
            assert colour in one.read_text()
        elif kind != "dots":  # these are translucent
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.asarray(Image.open(one).convert("RGB")) == rgb).all(-1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_are_named_before_anything_is_written_and_a_dollar_in_a_name_is_a_dollar(kind, runs, run, tmp_path):
    draw, out, young, pictures = KINDS[kind], tmp_path / "new/a.png", run("cutmix", 51.0, lr=0.1).folder, set()
    file, log = young / "recipe.yaml", young / "log.jsonl"
    text = file.read_text()
    for name in (r"a$\x$b", r"a$\y$b"):
        file.write_text(text.replace("name: quickstart_cutmix", f"name: {name}"))
        draw([runs[2], Run.open(young)], tmp_path / "dollar.svg")
        pictures.add((tmp_path / "dollar.svg").read_bytes())
    assert len(pictures) == 2
    log.write_text(log.read_text().splitlines()[0] + "\n")
    for given, where, says in (
        (runs[2:], tmp_path / "new/a.pdf", r"a.pdf: expected a file name that ends in .png or .svg"),
        ([], out, "no run folders given"),
        ([runs[0], Run.open(young)], out, "no evaluated epoch yet"),
        (runs[2:], runs[0].folder / "log.jsonl/a.png", "cannot write"),
    ):
        with pytest.raises(UserError, match=says):
            draw(given, where)
    assert not (tmp_path / "new").exists()


def test_seeds_of_a_recipe_make_a_group_with_mean_and_deviation_and_only_like_is_compared_with_like(run):
    runs = [run("mixup", top1, seed=seed) for seed, top1 in enumerate((50.0, 53.0, 56.0))]
    (group,) = grouped(runs)
    assert (group.setting, group.name, group.values) == ("quickstart", "mixup", [50.0, 53.0, 56.0])
    assert (group.mean, group.std, group.number) == (53.0, 3.0, "53.00 ± 3.00")
    (usual,) = grouped(runs[:1])
    assert (usual.std, usual.number) == (None, "50.00")
    other, young = run("mixup", 50.0, seed=1, mixer_args={"alpha": 0.7}), run("mixup", 50.0, seed=2, epochs=2)
    names = [group.name for group in grouped([runs[0], other, young])]
    assert names == ["mixup alpha 0.4", "mixup alpha 0.7", "mixup alpha 0.4 (2 of 3 epochs)"]
    twice = [runs[0], run("mixup", 50.0, speed=99.0)]
    assert [g.name for g in grouped(twice)] == [f"mixup ({each.folder.name})" for each in twice]
    fewer = run("mixup", 50.0, seed=3, protocol_epochs=2, weight_decay=0)
    assert [group.setting for group in grouped([runs[0], fewer])] == [
        "quickstart, weight_decay 0.0005, protocol_epochs 1", "quickstart, weight_decay 0, protocol_epochs 2",
    ]  # fmt: skip
    runs = [run("vanilla", 50.0 + 2 * seed, seed=seed, lr=0.2) for seed in (0, 1)]
    runs += [run("mixup", 60.0, lr=0.2), run("mixup", 61.0, lr=0.4), run("vanilla", 7.0, lr=0.4)]
    head = " | top-1 (last epoch) | std | seeds | lowest | highest |\n| --- |" + " ---: |" * 5
    assert seeds_table(runs).split("\n\n") == [
        f"| quickstart, lr 0.2{head}\n| mixup | 60.00 |  | 1 | 60.00 | 60.00 |\n"
        "| vanilla | 51.00 | 1.41 | 2 | 50.00 | 52.00 |",  # the root of 2
        f"| quickstart, lr 0.4{head}\n| mixup | 61.00 |  | 1 | 61.00 | 61.00 |\n"
        "| vanilla | 7.00 |  | 1 | 7.00 | 7.00 |",
        "Mean, standard deviation (n - 1) and range over seeds, top-1 in percent.\n",
    ]


def test_curves_draw_each_seed_thin_and_their_mean_bold_a_single_run_as_a_line_and_a_single_epoch_as_a_point(runs, run):
    left, right = plots.curves_figure(grouped(runs)).axes
    for axes, first, second in ((left, [2.5, 2.0, 1.5], [3.5, 3.0, 2.5]), (right, [30, 40, 50], [32, 42, 52])):
        thin, thin_too, bold = axes.lines[:3]
        assert list(thin.get_ydata()) == first and list(thin_too.get_ydata()) == second
        assert list(bold.get_ydata()) == [statistics.fmean(pair) for pair in zip(first, second, strict=True)]
        assert thin.get_linewidth() < 1 < bold.get_linewidth() and list(bold.get_xdata()) == [1, 2, 3]
        assert len({line.get_color() for line in axes.lines}) == 3 and len(axes.lines) == 9
        assert {line.get_color() for line in axes.lines[:3]} == {plots.COLOURS[0]}
    labels = ["vanilla  51.00 ± 1.41", "mixup  55.00 ± 1.41", "cutmix  54.00 ± 1.41"]
    assert [text.get_text() for text in right.texts] == labels
    for epochs, marker, values in ((3, "", [30, 40, 50]), (1, "o", [30])):
        (line,) = plots.curves_figure(grouped([run("mixup", 50.0, epochs=epochs)])).axes[1].lines
        assert line.get_marker() == marker and list(line.get_ydata()) == values
    assert len({tuple(plots.style(i).values()) for i in range(28)}) == 28


def test_labels_keep_their_distance_their_order_and_the_limits():
    assert plots.spread([10.0, 30.0], 5) == [10.0, 30.0]
    assert plots.spread([30.0, 10.0, 10.0], 5) == [30.0, 7.5, 12.5]
    placed = plots.spread([1.0, 1.1, 1.2, 4.0, 9.0], 2)
    assert placed == sorted(placed) and min(np.diff(placed)) >= 2 - 1e-9 and placed[-1] == 9.0
    assert plots.within([5.0, 9.0, 12.0], 2, 0, 10) == [5.0, 8.0, 10.0]
    assert plots.within([-3.0, 0.5, 7.0], 2, 0, 10) == [0.0, 2.0, 7.0]


def points(axes):
    """The drawn points by the name of their group."""
    return {line.get_gid(): [tuple(xy) for xy in line.get_xydata()] for line in axes.lines if line.get_gid()}


def test_cost_is_relative_to_vanilla_on_the_same_machine_and_wall_time_without_one_beside_a_run(runs, run):
    (axes,) = plots.cost_figure(grouped(runs)).axes
    costs = {"vanilla": (1.0, 50.0), "mixup": (2.0, 54.0), "cutmix": (2.5, 53.0)}  # vanilla: 200 images/s
    assert points(axes) == {name: [(x, top1), (x, top1 + 2)] for name, (x, top1) in costs.items()}
    assert axes.get_xlabel() == "training time per image, relative to vanilla"
    assert axes.get_ylabel() == "top-1 on test (%), last epoch"
    fast = {"env": ENV | {"device": "B"}, "seed": 2}
    both = [*runs, run("vanilla", 51.0, 1000.0, **fast), run("mixup", 51.0, 800.0, **fast)]
    (axes,) = plots.cost_figure(grouped(both)).axes
    assert points(axes)["mixup"][-1] == (1.25, 51.0) and points(axes)["cutmix"][0] == (2.5, 53.0)
    for seed, env in enumerate((None, ENV | {"device": "B"}, {"device": "A"}, [1])):
        groups = grouped([*runs, run("rsb", 40.0, 50.0, seed, env=env)])
        times, unit = plots.measured_costs(groups)
        assert (unit, groups[0].name, groups[3].name) == ("wall time of the run (s)", "vanilla", "rsb")
        assert (times[0], times[3]) == ([15.0, 15.0], [60.0])


@pytest.mark.parametrize("count", [1, 4, 12])
def test_names_cover_neither_points_nor_each_other(count, run):
    rng = np.random.default_rng(count)
    runs = [run("vanilla", 50.0, 100.0)]
    for i, seed in itertools.product(range(1, count), (0, 1, 2)):
        top1, speed = 50 + round(rng.normal(0, 1), 2), 100 - round(rng.uniform(0, 6), 2)
        runs.append(run("mixup", top1, speed, seed, mixer_args={"alpha": i / 10}))
    figure = plots.cost_figure(grouped(runs))
    (axes,), canvas = figure.axes, FigureCanvasAgg(figure)
    canvas.draw()
    assert len(axes.texts) == count
    boxes = [matplotlib.text.Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    drawn = [axes.transData.transform(xy) for group in points(axes).values() for xy in group]
    for box in boxes:
        assert not any(box.contains(*xy) for xy in drawn)
        assert all(axes.get_window_extent().padded(1).contains(*corner) for corner in box.corners())


def test_dots_are_sorted_rows_of_seeds_with_mean_and_deviation(runs):
    (axes,) = plots.dots_figure(grouped(runs), {"mixup": 58.5, "rsb": 1.0}).axes
    rows = [(0, "vanilla", 50.0), (1, "cutmix", 53.0), (2, "mixup", 54.0)]  # the best on top
    assert [label.get_text() for label in axes.get_yticklabels()] == [name for _, name, _ in rows]
    dots = {name: [(top1, y), (top1 + 2, y)] for y, name, top1 in rows}
    assert points(axes) == dots | {"published": [(58.5, 2.0)]}
    for (y, _, top1), bar in zip(rows, axes.containers, strict=True):
        mark, _, (segments,) = bar.lines
        assert mark.get_xydata().tolist() == [[top1 + 1, y]]
        (ends,) = segments.get_segments()
        assert ends.tolist() == [[pytest.approx(top1 + 1 - 2**0.5), y], [pytest.approx(top1 + 1 + 2**0.5), y]]
    assert "dots: seeds, bar: mean ± standard deviation, hollow: published" in axes.get_xlabel()
    assert "top-1 on test (%), last epoch" in axes.get_xlabel()


def test_a_panel_per_setting_and_a_colour_per_mixer_in_all_of_them(runs, run, tmp_path):
    both = [*runs, run("cutmix", 70.0, lr=0.1)]
    first, second = plots.dots_figure(grouped(both), {}).axes
    assert (first.get_title("left"), second.get_title("left")) == ("quickstart, lr 0.2", "quickstart, lr 0.1")
    assert points(second) == {"cutmix": [(70.0, 0.0)]}
    colours = [line.get_color() for axes in (first, second) for line in axes.lines if line.get_gid() == "cutmix"]
    assert colours == [plots.COLOURS[1]] * 2  # vanilla, cutmix, mixup
    assert len(plots.cost_figure(grouped(both)).axes) == 2
    with pytest.raises(UserError, match="published numbers belong to one setting, got runs of 2"):
        plots.dots(both, tmp_path / "a.png", {"cutmix": 77.0})
    assert not (tmp_path / "a.png").exists()
