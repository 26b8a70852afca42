"""Recipes: names resolve, values keep their origin, mistakes are explained, and published settings do not drift."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest
from timm.data.auto_augment import rand_augment_transform
from tiny import ROOT

from mixers import MIXERS, build
from mixup_recipes import flags, names, resolve
from mixup_recipes.recipe import Recipe, differences, explain, schema, to_yaml
from mixup_recipes.resolve import load_recipe, settings, split_name
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError, convert, describe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of settings; write one with ``setting``."""
    monkeypatch.setattr(resolve, "FOLDER", tmp_path)
    return tmp_path


def setting(folder, name, text=""):
    """Write a setting that is complete but for ``text``."""
    path = folder / f"{name}.yaml"
    path.write_text(f"dataset: owner/set\nmodel: resnet18\n{text}\n")
    return path


def complaint(name, **overrides):
    """What resolve says about a mistake; always one line."""
    with pytest.raises(UserError) as caught:
        load_recipe(str(name), **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_recipe_without_the_later_arguments_means_what_it_meant_then(tmp_path):
    saved = tmp_path / "recipe.yaml"
    lines = to_yaml(load_recipe("deit_s_automix")).splitlines()
    saved.write_text("\n".join(line for line in lines if "pixels" not in line).replace("mask_loss_law: compounded", ""))
    recipe = load_recipe(str(saved))
    assert recipe.pixels == "v1" and recipe.mixer_args["automix"]["mask_loss_law"] == "cosine"
    assert build(recipe.mixer, **recipe.mixer_args["automix"]).mask_loss_law == "cosine"
    assert load_recipe("deit_s_automix").pixels == "v2"


@pytest.mark.parametrize("name", settings())
def test_every_cell_is_a_complete_recipe_and_its_saved_file_is_the_same_one(name, tmp_path):
    saved, number = tmp_path / "recipe.yaml", [*settings()].index(name)
    for place, mixer in enumerate(MIXERS):
        recipe, origin = resolve.resolve(f"{name}_{mixer}")
        assert recipe.name == f"{name}_{mixer}" == f"{split_name(recipe.name)[0]}_{recipe.mixer}"
        assert set(dataclasses.asdict(recipe)) <= set(origin)
        if (place + number) % 4 == 0:
            saved.write_text(to_yaml(recipe))
            assert load_recipe(str(saved)) == recipe
    assert load_recipe(name) == load_recipe(f"{name}_vanilla")


def test_every_field_has_a_docstring_a_type_in_words_and_a_valid_default():
    for cls in (Recipe, Job):
        for name, kind in schema(cls).items():
            value = getattr(cls(), name)
            assert flags.field_docs(cls)[name].endswith(".") and describe(kind), name
            assert convert(value, kind, name) == value


def test_names_and_shipped_recipes_are_resolved_without_torch_and_own_arguments_are_checked_all_the_same():
    code = (
        "import sys; from mixup_recipes.resolve import *\n"
        "for name in settings(): resolve(f'{name}_automix'), resolve(f'{name}_mixup', {'lr': 1})\n"
        "for name, changes in (('resnet50_cutmix', {}), ('r50_100e_mixup', {'mixer_args': {'alpha': -1}})):\n"
        "    try: resolve(name, changes)\n"
        "    except UserError as e: print(e, 'torch' in sys.modules, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said, before, refused, after = done.stdout.splitlines()
    assert said.endswith("did you mean 'r50_100e_cutmix'?") and refused == "alpha must be a number above 0, got -1"
    assert (before, after) == ("False", "True")


def test_command_line_beats_name_beats_fields_for_one_mixer_beat_file_beats_base_beats_default(folder):
    below = "epochs: 11\nlr: 0.11\nmixer: cutmix\nmomentum: 0.11\nper_mixer: {mixup: {epochs: 22, lr: 0.22, seed: 22}}"
    setting(folder, "below", below)
    setting(
        folder, "above", "base: below\nlr: 0.33\nmixer: rsb\nper_mixer: {mixup: {momentum: 0.5}, cutmix: {lr: 0.44}}"
    )
    recipe, origin = resolve.resolve("above_mixup", {"seed": 9})
    for field, value, source in (
        ("weight_decay", 1e-4, "default"), ("epochs", 22, "below.yaml: per_mixer.mixup"), ("lr", 0.33, "above.yaml"),
        ("momentum", 0.5, "above.yaml: per_mixer.mixup"), ("mixer", "mixup", "recipe name"),
        ("seed", 9, "command line"),
    ):  # fmt: skip
        assert (getattr(recipe, field), origin[field]) == (value, source)
    recipe, origin = resolve.resolve("above_cutmix")
    assert (recipe.lr, recipe.epochs, recipe.momentum, recipe.seed) == (0.44, 11, 0.11, 0)
    assert (origin["epochs"], recipe.name) == ("below.yaml", "above_cutmix")
    assert load_recipe("above", mixer="cutmix") == recipe  # however the mixer was chosen
    assert load_recipe("above").mixer == "rsb" and load_recipe("above_vanilla").epochs == 11


def test_arguments_of_mixers_are_merged_one_by_one_each_with_its_origin(folder):
    rows = "deit: {mixup_alpha: 0.7, cutmix_alpha: 0.6}, rsb: {mixup_alpha: 0.3}, mixup: {alpha: 0.5}"
    setting(folder, "below", f"mixer_args: {{{rows}}}")
    setting(folder, "above", "base: below\nmixer_args: {deit: {cutmix_alpha: 0.4}}")
    for mixer, given, mixup, cutmix in (
        ("deit", {}, (0.7, "below.yaml"), (0.4, "above.yaml")),
        ("deit", {"mixup_alpha": 0.2}, (0.2, "command line"), (0.4, "above.yaml")),
        ("rsb", {"cutmix_alpha": "0.5"}, (0.3, "below.yaml"), (0.5, "command line")),
        ("rsb", {}, (0.3, "below.yaml"), (1.0, "mixer's default")),
    ):
        recipe, origin = resolve.resolve(f"above_{mixer}", {"mixer_args": given})
        found = {k: (v, origin[f"mixer_args.{mixer}.{k}"]) for k, v in recipe.mixer_args[mixer].items()}
        assert found == {"mixup_alpha": mixup, "cutmix_alpha": cutmix}
        assert recipe.mixer_args["mixup"] == {"alpha": 0.5}


def test_a_mixer_that_undoes_the_normalisation_gets_the_recipes_numbers():
    for given, source in (([0.4914, 0.4822, 0.4465], "the recipe's mean"), ([0.5, 0.5, 0.5], "command line")):
        changes = {"std": (0.3, 0.3, 0.3)} | ({"mixer_args": {"mean": given}} if source == "command line" else {})
        recipe, origin = resolve.resolve("cifar10_r18_200e_saliencymix", changes)
        args = recipe.mixer_args["saliencymix"]
        assert (args["mean"], args["std"], origin["mixer_args.saliencymix.mean"]) == (given, [0.3, 0.3, 0.3], source)


NESTING = """
mean: [0.1, 0.2, 0.3]
mixer: decouplemix
mixer_args:
  puzzlemix: {alpha: 0.4}
  cutmix: {alpha: 0.6}
  decouplemix: {base: %s}
"""
BOTH = {"mixers": [{"cutmix": {"alpha": 0.6}}, {"mixup": {"alpha": 0.3}}], "probs": None}


def test_a_mixer_inside_a_mixer_gets_what_the_setting_says_of_it_and_a_mistake_is_named(tmp_path):
    for base, expected in {
        "cutmix": {"cutmix": {"alpha": 0.6}},
        "{cutmix: {alpha: 0.9}}": {"cutmix": {"alpha": 0.9}},
        "{cutmix: null}": {"cutmix": {"alpha": 0.6}},
        "puzzlemix": {"puzzlemix": {"alpha": 0.4, "mean": [0.1, 0.2, 0.3]}},  # the recipe's normalisation
        "{switch: {mixers: [cutmix, {mixup: {alpha: 0.3}}]}}": {"switch": BOTH},
    }.items():
        recipe = load_recipe(str(setting(tmp_path, "one", NESTING % base)))
        ((name, args),) = recipe.mixer_args["decouplemix"]["base"].items()
        assert {name: {key: args[key] for key in expected[name]}} == expected
        assert name == "puzzlemix" or args.keys() == expected[name].keys()  # it has many more arguments
        (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
        assert dataclasses.replace(load_recipe(str(tmp_path / "saved.yaml")), name="one") == recipe
    for base, says in {
        "cutmux": "unknown mixer 'cutmux'; did you mean 'cutmix'?",
        "{cutmix: {alfa: 1}}": "mixer 'cutmix' has no argument 'alfa'; did you mean 'alpha'?",
        "{cutmix: 3}": "a mixer is written as name or {name: {argument: value}}, got {'cutmix': 3}",
    }.items():
        assert complaint(setting(tmp_path, "one", NESTING % base)) == says
    assert load_recipe(str(setting(tmp_path, "two", NESTING % "{decouplemix: {base: decouplemix}}")))


def test_a_mistake_in_a_file_is_named_with_the_file_whichever_mixer_or_setting_is_asked_for(folder):
    setting(folder, "two", "base: one")
    # what YAML takes for times, dates and the like is no number
    integers = ("many", "1:30", "2020-01-01", "0b11")
    for text, says in {
        "per_mixer: 3": "per_mixer: expected a table of mixer -> fields",
        "per_mixer: {mixup: 3}": "per_mixer: expected a table of mixer -> fields",
        "per_mixer: {mixpu: {lr: 1}}": "per_mixer: unknown mixer 'mixpu'; did you mean 'mixup'?",
        "per_mixer: {mixup: {lrr: 1}}": "per_mixer.mixup: unknown recipe field 'lrr'; did you mean 'lr'?",
        "per_mixer: {mixup: {lr: -1}}": "per_mixer.mixup: lr: expected a number above 0, got -1",
        "per_mixer: {mixup: {mixer: cutmix}}": "per_mixer.mixup cannot set mixer",
        "epochz: 3": "unknown recipe field 'epochz'; did you mean 'epochs'?",
        **{f"epochs: {x}": f"epochs: expected an integer at least 1, got {x!r}" for x in integers},
        **{f"lr: {x}": f"lr: expected a number above 0, got {x!r}" for x in ("1:30.5", "2020-13-45")},
    }.items():
        setting(folder, "one", text)
        assert complaint("one_cutmix") == complaint("two") == f"one.yaml: {says}"


def test_a_base_is_a_known_setting_used_once_and_never_chained(folder):
    setting(folder, "swin_t")
    for name, base in (("b", "swin_t"), ("c", "b"), ("x", "swin_s")):
        setting(folder, name, f"base: {base}")
    assert load_recipe("b").dataset == "owner/set"
    assert complaint("c") == "c.yaml: base 'b' has a base of its own; bases are not chained"
    assert complaint("x") == "x.yaml: unknown base 'swin_s'; did you mean 'swin_t'?"
    for empty in ("[swin_t]", "[]", "''", "{}", ""):
        setting(folder, "z", f"base: {empty}")
        assert "z.yaml: unknown base" in complaint("z")


def test_settings_are_the_files_of_the_folder_and_the_longest_name_wins(folder):
    assert settings() == {}
    paths = {name: setting(folder, name) for name in ("r50", "r50_rsb", "r50_rsb_a3")}
    (folder / "notes.txt").write_text("no setting")
    assert settings() == paths
    for name, parts in {
        "r50_rsb_a3_mixup": ("r50_rsb_a3", "mixup"), "r50_rsb": ("r50_rsb", None), "r50_mixup": ("r50", "mixup"),
        "r50_rsb_a3_rsb": ("r50_rsb_a3", "rsb"), "r50_rsb_rsb": ("r50_rsb", "rsb"),
    }.items():  # fmt: skip
        assert split_name(name) == parts
        recipe = load_recipe(name)
        assert (recipe.name, recipe.mixer) == (f"{parts[0]}_{parts[1] or 'vanilla'}", parts[1] or "vanilla")


def test_a_recipe_file_may_lie_anywhere_and_stand_on_a_setting(tmp_path, monkeypatch):
    setting(tmp_path, "mine", "epochs: 7\nmixer: mixup")
    recipe, origin = resolve.resolve(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.epochs, recipe.mixer, origin["epochs"]) == ("mine", 7, "mixup", "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml") == load_recipe("./mine.yaml") == recipe
    Path("short.yaml").write_text("base: r50_100e\nepochs: 2\n")
    expected = {"name": ("r50_100e_vanilla", "short"), "epochs": (100, 2)}
    assert differences(load_recipe("r50_100e"), load_recipe("short.yaml")) == expected
    Path("merged.yaml").write_text(
        "base: quickstart\nmodel_args: &a {x: 1, y: 2}\nmixer_args: {<<: {mixup: {alpha: 3}}}\n<<: {lr: 1}\nlr: 2"
    )  # a table may take over another and change it
    recipe = load_recipe("merged.yaml")
    assert (recipe.lr, recipe.model_args, recipe.mixer_args["mixup"]) == (2.0, {"x": 1, "y": 2}, {"alpha": 3})


def test_a_file_that_is_no_recipe_or_missing_is_explained(tmp_path):
    path = tmp_path / "broken.yaml"
    for says, texts in {
        "is not valid YAML": ("lr: 0.1\n\tepochs: 3", b"\xff\xfe\xfa", "epochs: !!int ''", "a\0b: 1"),
        "is not valid YAML: while parsing a flow sequence": ("lr: [0.1",),
        "must be a table of names and values, got list": ("- lr\n- epochs",), "values, got str": ("just words",),
        "must be a table of names and values, got NoneType": ("",),
        "'epochs' is given twice in line 3, column 1": ("lr: 1\nepochs: 3\nepochs: 90",),
        "'epochs' is given twice in line 2": ("epochs: 3\n'epochs': 3",),
        "'maybe' in line 1": ("sync_bn: !!bool maybe",),
        "'mixup' is given twice in line 3": ("per_mixer:\n  mixup: {lr: 1}\n  mixup: {lr: 2}",),
        "'lr' is given twice in line 1": ("<<: {lr: 1, lr: 2}",),
        "Exceeds the limit (4300 digits)": ("epochs: " + "9" * 5000,),
        "an alias inside of the value that it names in line 1": ("model_args: &a {x: *a}", "model_args: &a [1, [*a]]"),
        "more than 50 levels in line 1": (f"aa: {'[' * 51}{']' * 51}", f"aa: {'{a: ' * 3000}1{'}' * 3000}"),
        "could not determine a constructor": ("lr: !!timestamp 2020-13-45", "model_args: {x: !!binary aGVsbG8=}"),
    }.items():  # fmt: skip
        for text in texts:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            assert str(path) in (said := complaint(path)) and says in said
    assert complaint(tmp_path / "no.yaml").endswith("no.yaml: No such file or directory")
    assert complaint("no/such/file") == "cannot read recipe file no/such/file: No such file or directory"
    assert complaint(f"{tmp_path}/").startswith("cannot read recipe file")


def test_an_unknown_name_is_answered_by_its_parts_with_what_it_means_and_every_meaning_is_a_valid_name():
    for name, says in {
        "zzz": "unknown recipe 'zzz': no setting starts it; valid settings: aircraft_r18, aircraft_rx50, ",
        "": "unknown recipe '': no setting starts it; valid settings: aircraft_r18, aircraft_rx50, ",
        "r50_100e_": "unknown recipe 'r50_100e_': no setting starts it; did you mean 'r50_100e",
        "r50_100e_cutmix_": "unknown recipe 'r50_100e_cutmix_': no setting starts it; did you mean 'r50_100e_cutmix'",
        "resnet50_cutmix": "recipe 'resnet50_cutmix' has a known mixer, 'cutmix', and an unknown setting, 'resnet50'; "
        "did you mean 'r50_100e_cutmix'?",
    }.items():
        assert complaint(name).startswith(says)
    for mixer, says in {
        "cutmx": "did you mean 'cutmix'?", "puzzle": "did you mean 'puzzlemix'?", "none": "did you mean 'vanilla'?",
        "zzz": "valid names: adautomix, alignmix, ",
    }.items():  # fmt: skip
        known = f"recipe 'r50_100e_{mixer}' has a known setting, 'r50_100e', and an unknown mixer '{mixer}'; "
        assert complaint(f"r50_100e_{mixer}").startswith(known + says)
    for name, meant in {
        "r50_100_cutmix": "r50_100e_cutmix", "deits_samix": "deit_s_samix", "resnet-50_cut_mix": "r50_100e_cutmix",
        "ResNet50_300_epochs_mix-up": "r50_300e_mixup", "resnext101_mixup": "rx101_100e_mixup",
        "deit_small_puzzle": "deit_s_puzzlemix", "efficientnet_b0_mixup": "effb0_rsb_a2_mixup",
        "mobilenet_cutmix": "mbv2_rsb_a2_cutmix", "swin_tiny_automix": "swin_t_automix", "pvt_mixup": "pvt_t_mixup",
        "convnext-tiny_baseline": "convnext_t_vanilla", "ImageNet_plain": "r50_100e_vanilla",
        "cifar_none": "cifar10_small_vanilla", "resnet18_cifar10_mixup": "cifar10_r18_200e_mixup",
        "tiny-imagenet_mixup": "tiny_r18_mixup", "deit_official": "deit_t_official",
        "WRN28-8_mixup": "cifar100_wrn288_400e_mixup", "inaturalist2018_resnet50_mixup": "inat18_r50_mixup",
        "CUB-200-2011_mixup": "cub_r18_mixup", "cifar100_deit_small_200_epochs_mixup": "cifar100_deit_s_200e_mixup",
    }.items():  # fmt: skip
        assert complaint(name).endswith(f"did you mean {meant!r}?")
    valid = {*schema(Recipe), *schema(Job), *MIXERS}
    assert set(names.MEANINGS.values()) <= valid and not set(names.MEANINGS) & valid
    assert len(names.BY_MEANING) == len(names.MEANINGS)


WRONG: dict[str, tuple] = {
    "epochs": ("an integer at least 1", 1.5, "1.5", 0, True, None), "seed": ("an integer at least 0", -1, 10**23),
    "lr": ("a number above 0", 0, "fast", "nan", float("inf"), True, 10**400),
    "smoothing": ("a number at least 0 and at most 1", 1.5), "sync_bn": ("true or false", "maybe", 1),
    "ema_decay": ("a number at least 0 and at most 1 or none", 2), "model": ("text", 18), "dataset": ("text", "a\0b"),
    "mean": ("3 numbers", [0.5, 0.5], 0.5, "abc"), "opt_betas": ("2 numbers or none", [0.9]),
    "model_args": ("a table", "img_size=64"), "train_crop": ("one of rrc, pad, pad_zeros, resize", ["rrc"]),
    "mixed_precision": ("one of no, fp16, bf16", True, "fp61"), "sched": ("one of cosine, constant", "cosin"),
}  # fmt: skip


def test_a_wrong_value_and_a_wrong_field_are_named_with_what_was_expected():
    near = {"fp61": "; did you mean 'fp16'?", "cosin": "; did you mean 'cosine'?"}
    for field, (what, *values) in WRONG.items():
        for value in values:
            message = complaint("quickstart", **{field: value})
            assert message.startswith(f"command line: {field}: expected {what}, got {value!r}")
            assert message.endswith(near.get(str(value), repr(value) if what[:6] != "one of" else ""))
    assert complaint("quickstart", scale=["a", 1]) == "command line: scale: expected a number, got 'a'"
    for wrong, meant in {
        "epoch": "epochs", "weight_decy": "weight_decay", "learning_rate": "lr", "Weight-Decay": "weight_decay",
        "num_epochs": "epochs", "batch": "batch_size",
    }.items():  # fmt: skip
        says = f"command line: unknown recipe field {wrong!r}; did you mean {meant!r}?"
        assert complaint("quickstart", **{wrong: 3}) == says


def test_a_wrong_mixer_argument_is_explained(tmp_path, without_shape_checks):
    alhpa = "mixer_args: mixer 'mixup' has no argument 'alhpa'; did you mean 'alpha'?"
    for text, mixer, args, says in (
        ("", "mixup", {"alhpa": 1}, "mixer 'mixup' has no argument 'alhpa'; did you mean 'alpha'?"),
        ("", "vanilla", {"alpha": 1}, "mixer 'vanilla' has no argument 'alpha'; valid names: none"),
        ("", "mixup", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("", "mixup", {"alpha": "much"}, "alpha must be a number above 0, got 'much'"),
        ("", "mixup", "0.5", "command line: mixer: expected a table, got '0.5'"),
        ("mixer_args: {mixup: {alhpa: 1}}", "mixup", {}, f"one.yaml: {alhpa}"),
        ("mixer_args: {mixup: {alhpa: 1}}", "cutmix", {}, f"one.yaml: {alhpa}"),
        ("per_mixer: {mixup: {mixer_args: {mixup: {alhpa: 1}}}}", "cutmix", {}, f"one.yaml: per_mixer.mixup: {alhpa}"),
        ("mixer_args: {mixup: {alpha: 0}}", "mixup", {}, "alpha must be a number above 0, got 0"),
        ("per_mixer: {mixup: {mixer_args: {mixup: {alpha: 0}}}}", "mixup", {}, "alpha must be a number above 0, got 0"),
        ("mixer_args: {mixpu: {alpha: 1}}", "mixup", {}, "one.yaml: mixer_args: unknown mixer 'mixpu'; did you mean"),
        ("mixer_args: {mixup: 0.5}", "mixup", {}, "one.yaml: mixer_args.mixup: expected a table of arguments"),
        ("mixer_args: 0.5", "mixup", {}, "one.yaml: mixer_args: expected a table, got 0.5"),
    ):
        assert complaint(setting(tmp_path, "one", text), mixer=mixer, mixer_args=args).startswith(says)


def test_values_that_do_not_fit_together_are_refused(folder):
    setting(folder, "one")
    for values, says in (
        *(({field: ""}, "recipe 'one_vanilla' must set dataset and model") for field in ("dataset", "model")),
        ({"batch_size": 100}, "batch_size 100 is not a multiple of per_device_train_batch_size 64; pass --per_device"),
        ({"epochs": 4, "warmup_epochs": 5}, "warmup_epochs 5 exceeds epochs 4: the run would end"),
        ({"min_lr": 0.2}, "min_lr 0.2 exceeds lr 0.1"), ({"report_ema": True}, "report_ema and ema_warmup_epochs need"),
        ({"eval_resize": 100_000}, "eval_resize: expected at most 4096 pixels, got 100000"),
        ({"eval_resize": 200}, "eval_resize 200 is smaller than the crop eval_size 224"),
        ({"scale": [0.5, 0.2]}, "scale: expected 0 < low <= high <= 1, got 0.5 0.2"),
        ({"ratio": [0, 1]}, "ratio: expected 0 < low <= high, got 0 1"),
        ({"std": [0.2, 0.2, 0]}, "std: expected 3 numbers above 0, got (0.2, 0.2, 0.0)"),
        ({"bce_target_thresh": 0.2}, "bce_target_thresh needs loss bce_mean, bce_sum or asymmetric, got ce"),
    ):  # fmt: skip
        assert complaint("one", **values).startswith(says)


RIGHT = ("m0", "m9", "m10", "mstd0.5", "mstd1", "inc0", "inc1", "n1", "n3", "p0.3", "p1", "tweights", "t3a", "t3aw")
FALSE = (
    "m11", "m-1", "mX", "m9.5", "m", "mstdinf", "mstd0,5", "inc", "inc2", "n0", "n2.5", "p2", "foo9", "w0", "tx", "",
)  # fmt: skip


def test_a_policy_is_accepted_if_and_only_if_timm_understands_every_part_of_it():
    rng, found = random.Random(0), set()
    for _ in range(300):
        right, wrong = rng.sample(RIGHT, rng.randint(0, 4)), rng.sample(FALSE, rng.randint(0, 1))
        policy = "-".join(["rand", *right, *wrong])
        keys = {"t" if part[0] == "t" else part.rstrip("0123456789.") for part in right}
        found.add(understood := not wrong and len(keys) == len(right))
        if understood:
            assert rand_augment_transform(load_recipe("quickstart", aa=policy).aa, {}).ops
        else:
            assert complaint("quickstart", aa=policy).endswith(f"each at most once), got {policy!r}")
    assert found == {True, False}
    for policy in ("", "v0", "original", "augmix-m5", "rond-m9", "rand-", "rand m9", "rand-m9\n"):
        says = "aa: expected a RandAugment policy such as rand-m9-mstd0.5-inc1 "
        assert complaint("quickstart", aa=policy).startswith(says)


def test_text_becomes_what_the_field_needs_and_in_a_free_table_what_yaml_reads(folder):
    for text, value in {
        "lr: 1e-4": 1e-4, "mixed_precision: no": "no", "epochs: 010": 10,  # YAML 1.1 reads text, false and 8
        "lr: 1": 1.0, "lr: '0.5'": 0.5, "epochs: 0x10": 16, "epochs: '3'": 3, "mixed_precision: 'no'": "no",
        "clip_grad: null": None, "clip_grad: none": None, "mean: [0, 0.5, 1e-1]": (0.0, 0.5, 0.1),
        "model_args: {day: 2020-01-01}": {"day": "2020-01-01"}, "sync_bn: 'True'": True,
        "model_args: {a: 64, b: 1e-6, c: x}": {"a": 64, "b": 1e-6, "c": "x"},
    }.items():  # fmt: skip
        setting(folder, "one", text)
        read = getattr(load_recipe("one"), text.split(":")[0])
        assert (read, type(read)) == (value, type(value)), text
    kept = ("resnet", "[", "2020-13-45", "9" * 5000, "&a [*a]", "{a: 1, a: 2}", "[" * 3000)
    for text, value in {
        "64": 64, "0.5": 0.5, "1e-4": 1e-4, "true": True, "False": False, "null": None, "[1e-3, true]": [1e-3, True],
        "{a: 1}": {"a": 1}, **dict(zip(kept, kept, strict=True)),
    }.items():  # fmt: skip
        read = load_recipe("one", model_args={"x": text}).model_args["x"]
        assert (read, type(read)) == (value, type(value))


def test_a_recipe_with_overrides_survives_saving_and_cannot_be_changed(tmp_path):
    recipe = load_recipe(
        "deit_s_deit", lr="3e-5", min_lr="1e-8", mean=["0.1", "0.2", "0.3"], clip_grad="none", opt_betas=(0.8, 0.9),
        model_args={"img_size": "64"}, mixed_precision="no", mixer_args={"mixup_alpha": "1e-1"}, channels_last="true",
    )  # fmt: skip
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe))
    again, origin = resolve.resolve(str(saved))
    assert again == recipe and to_yaml(again) == to_yaml(recipe)
    assert again.mixer_args["deit"] == {"mixup_alpha": 0.1, "cutmix_alpha": 1.0}
    assert {v for k, v in origin.items() if k in schema(Recipe)} == {"recipe.yaml"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0


def test_differences_names_what_differs_and_explain_shows_every_value_with_its_origin():
    a, other = load_recipe("r50_100e_mixup"), load_recipe("r50_100e_mixup", epochs=2, seed=1)
    assert differences(a, a) == {}
    assert differences(a, other) == {"epochs": (100, 2), "seed": (0, 1)}
    assert differences(a, other, ignore=("seed",)) == {"epochs": (100, 2)}
    b = load_recipe("r50_100e_mixup", mixer_args={"alpha": 0.5})
    assert differences(a, b) == {"mixer_args": ({"alpha": 0.2}, {"alpha": 0.5})}
    assert differences(a, dataclasses.replace(a, mixer_args=a.mixer_args | {"cutmix": {"alpha": 9.0}})) == {}
    lines = explain(*resolve.resolve("deit_s_deit", {"seed": 3, "mixer_args": {"mixup_alpha": 0.5}})).splitlines()
    words = {line.split()[0]: line.split()[1:] for line in lines}
    assert set(words) >= set(schema(Recipe)) - {"mixer_args"}
    assert (words["lr"], words["hflip"]) == (["0.001", "deit_s.yaml"], ["0.5", "default"])
    assert words["seed"] == ["3", "command", "line"]
    assert words["mixer_args.deit.mixup_alpha"] == ["0.5", "command", "line"]
