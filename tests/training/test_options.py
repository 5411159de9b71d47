"""The command line: timm's flags, strict YAML, and everything refused before a run starts."""

import argparse
import csv
import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from timm_rdp import add_rdp_args
from timm_rdp.errors import UsageError
from timm_rdp.training.flags import build_parser, flag
from timm_rdp.training.options import NEEDS, args_text, parse_args, read_config, recipes

TABLE = (Path(__file__).parents[1] / "timm_train_flags.csv").read_text()
FLAGS = list(csv.DictReader(TABLE.splitlines()))
DEFAULTS = {row["dest"]: json.loads(row["default"]) for row in FLAGS if row["dest"] != "device"}
DEFAULTS = {name: default for name, default in DEFAULTS.items() if default}
RDP_PARSER = argparse.ArgumentParser()
add_rdp_args(RDP_PARSER)
RDP_FLAGS = set(vars(RDP_PARSER.parse_args([]))) | {"data_seed", "drop_path_schedule"}


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("row", FLAGS, ids=[row["dest"] for row in FLAGS])
def test_every_flag_of_timm_has_timms_names_type_and_default(row):
    action = next(a for a in build_parser()._actions if a.dest == row["dest"])
    assert (action.option_strings or ["data"]) == row["flags"].split()
    if row["dest"] != "device":  # a deliberate difference, tested on its own
        assert action.default == json.loads(row["default"])
    assert action.nargs == (int(row["nargs"]) if row["nargs"].isdigit() else row["nargs"] or None)
    if row["choices"]:
        assert list(action.choices) == json.loads(row["choices"])
    elif action.choices:  # timm's script takes any text, and its library these
        assert action.default in (None, *action.choices)
    assert action.const == (
        json.loads(row["const"]) if row["const"] else True if row["kind"] == "flag" else None
    )
    if row["type"] in ("int", "float"):
        assert type(action.type("1" if row["type"] == "int" else "0.5")).__name__ == row["type"]
    else:
        assert action.type is None


def test_there_is_no_flag_beyond_timms_and_the_rdp_group():
    dests = set(vars(build_parser().parse_args([])))
    assert dests == {row["dest"] for row in FLAGS} | RDP_FLAGS
    assert {"rdp", "rdp_batch", "rdp_every", "rdp_start_epoch", "rdp_seed"} <= RDP_FLAGS


def test_key_value_flags_parse_python_values():
    args = build_parser().parse_args(["--model-kwargs", "depth=3", "act=gelu", "x=(1, 2)"])
    assert args.model_kwargs == {"depth": 3, "act": "gelu", "x": (1, 2)}


def test_device_defaults_to_the_best_there_is(digits_folder):
    here = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    best = [name for name, module in here.items() if module.is_available()]
    args = parse_args(["--data-dir", str(digits_folder)])
    assert args.device in (best or ["cpu"])


def test_rdp_without_a_drop_path_rate_takes_a_tenth_and_says_so(digits_folder, caplog):
    caplog.set_level("INFO")
    assert parse_args(["--data-dir", str(digits_folder), "--rdp"]).drop_path == 0.1
    assert "--drop-path 0.1" in caplog.text
    caplog.clear()
    args = parse_args(["--data-dir", str(digits_folder), "--rdp", "--drop-path", "0.3"])
    assert args.drop_path == 0.3
    assert parse_args(["--data-dir", str(digits_folder)]).drop_path is None
    assert caplog.text == ""


def test_without_data_the_run_is_the_demo_with_its_recipe(digits_folder, demo_cache):
    demo = parse_args(["--rdp"])
    assert demo.demo
    assert Path(demo.data_dir).parent == demo_cache
    for key, value in yaml.safe_load(recipes()["demo_digits"].read_text()).items():
        assert getattr(demo, key) == value

    own = parse_args(["--data-dir", str(digits_folder)])
    assert not own.demo
    assert own.epochs == 300 and own.num_classes is None
    assert parse_args([str(digits_folder)]).data_dir == str(digits_folder)


def test_command_line_overrides_config_overrides_demo_recipe(tmp_path):
    config = config_file(tmp_path, "epochs: 7\nlr: 5e-4\nopt: lamb\nmodel-ema: true\n")
    args = parse_args(["-c", str(config), "--epochs", "9", "--num-classes", "11"])
    assert (args.epochs, args.lr, args.opt, args.num_classes) == (9, 5e-4, "lamb", 11)
    assert args.model_ema is True
    assert args.img_size == yaml.safe_load(recipes()["demo_digits"].read_text())["img_size"]


def test_args_yaml_reads_back_as_the_same_options(tmp_path, digits_folder):
    argv = ["--data-dir", str(digits_folder), "--rdp", "--opt-betas", "0.9", "0.95", "--mixup", "1"]
    argv += ["--model-kwargs", "act_layer=gelu", "--rdp-every", "2", "--val-split", ""]
    first = parse_args(argv)
    again = parse_args(["-c", str(config_file(tmp_path, args_text(first)))])
    assert args_text(again) == args_text(first)
    assert set(yaml.safe_load(args_text(first))) == ({row["dest"] for row in FLAGS} | RDP_FLAGS) - {
        "config"
    }


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 5e-4", "lr", 5e-4),  # YAML takes a number without a dot for a text
        ("lr: 1", "lr", 1.0),
        ("experiment: 12", "experiment", "12"),
        ("color_jitter: null", "color_jitter", None),
        ("val_split: null", "val_split", ""),
        ("interpolation: null", "interpolation", ""),
        ("warmup_lr: -0.0", "warmup_lr", 0.0),
        ("lr_noise: [-1, 0.5]", "lr_noise", [-1.0, 0.5]),
        ("data: --help", "data", "--help"),
        ("data: 7", "data", "7"),
        ("aa: -x y", "aa", "-x y"),
        ("rdp: false", "rdp", False),
        ("epochs: 300", "epochs", 300),
        ("mean: [0.5, 1e-1, 0]", "mean", [0.5, 0.1, 0.0]),
        ("wandb_tags: []", "wandb_tags", []),
        ("torchcompile: aot_eager", "torchcompile", "aot_eager"),
        ("model_kwargs: {depth: 3}", "model_kwargs", {"depth": 3}),
        ("drop-path: 0.2", "drop_path", 0.2),
    ],
)
def test_config_values_become_what_the_flag_would_give(tmp_path, text, name, value):
    assert read_config(config_file(tmp_path, text), build_parser()) == {name: value}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "mapping None"),
        ("- a\n- b\n", "mapping ['a',"),
        ("just words", "mapping 'just words'"),
        ("lr: [1\n", "not valid YAML line 2"),
        ("lr: 0.1\nlr: 0.2\n", "'lr' twice line 2"),
        ("drop_path: 0.1\ndrop-path: 0.2\n", "drop_path twice"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("day: 2001-99-99", "not valid YAML"),
        ("drop_pth: 0.1", "unknown key 'drop_pth' drop_path"),
        ("7: 8", "unknown key 7"),
        ("config: other.yaml", "unknown key 'config'"),
        ("epochs: 5.5", "--epochs whole number 5.5"),
        ("epochs: true", "--epochs one value True"),
        ("epochs: many", "--epochs whole number many"),
        ("epochs: [5]", "--epochs one value [5]"),
        ("epochs: null", "--epochs one value None"),
        ("lr: fast", "--lr number fast"),
        ("rdp: 1", "--rdp true or false 1"),
        ("rdp: 'yes'", "--rdp true or false 'yes'"),
        ("rdp_batch: sam", "--rdp-batch same next 'sam'"),
        ("model: true", "--model one value True"),
        ("model: [a]", "--model one value ['a']"),
        ("input_size: [3, 32]", "--input-size 3"),
        ("input_size: 3", "--input-size list 3"),
        ("opt_betas: 0.9", "--opt-betas list 0.9"),
        ("opt_betas: [0.9, x]", "--opt-betas number x"),
        ("opt_betas: []", "--opt-betas"),
        ("model_kwargs: depth=3", "--model-kwargs mapping 'depth=3'"),
        ("wandb_tags: [a, --rdp]", "--wandb-tags --rdp dash"),
        ("wandb_tags: [-h]", "--wandb-tags -h dash"),
        ("device_modules: [--]", "--device-modules -- dash"),
        ("model_kwargs: {-h: 1}", "--model-kwargs -h dash"),
        ("torchscript: true\ntorchcompile: inductor\nrdp: nope", "--rdp"),
        ("smoothing: 1.0", "--smoothing 1.0 at least 0 and below 1"),
        ("amp_dtype: null", "--amp-dtype float16"),
    ],
)
def test_config_that_cannot_be_used_names_the_file_and_the_key(tmp_path, refused, text, words):
    path = config_file(tmp_path, text)
    line = refused("-c", path)
    for word in (str(path), *words.split()):
        assert word in line


def test_a_recipe_is_found_by_its_name_and_listed_by_the_help(
    tmp_path, monkeypatch, capsys, refused
):
    monkeypatch.chdir(tmp_path)
    named = read_config("vit_tiny_cifar100", build_parser())
    assert named == read_config(recipes()["vit_tiny_cifar100"], build_parser())
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "vit_tiny_cifar100" in capsys.readouterr().out
    line = refused("-c", "vit_tiny_cifar10O")
    assert "vit_tiny_cifar10O" in line and "vit_tiny_cifar100" in line


def test_config_that_is_missing_or_a_folder_is_named(tmp_path, refused):
    assert str(tmp_path / "no.yaml") in refused("-c", tmp_path / "no.yaml")
    assert str(tmp_path) in refused("-c", tmp_path)


def test_config_that_is_no_text_is_refused(tmp_path, refused):
    path = tmp_path / "config.yaml"
    path.write_bytes(bytes(range(256)))
    assert "not valid YAML" in refused("-c", path)


REFUSED = [
    # the command line itself
    ("--rpd", "--rpd --rdp"),
    ("--epochs many", "--epochs many whole number"),
    ("--rdp-batch both", "--rdp-batch 'both' same next"),
    ("--model-kwargs depth", "--model-kwargs key=value 'depth'"),
    ("--torchscript --torchcompile", "--torchscript --torchcompile"),
    # names
    ("--model vit_smal_patch16_224", "vit_smal_patch16_224 vit_small_patch16_224"),
    ("--model qqqqqqq", "qqqqqqq"),
    ("--model resnet50.nope", "--model resnet50.nope tag"),
    ("--model vit_tiny_patch16_224.", "vit_tiny_patch16_224."),
    ("--model nowhere:resnet50", "nowhere:resnet50"),
    ("--model local-dir:/no/such/folder", "/no/such/folder config.json"),
    ("--opt adamq", "--opt adamq adam"),
    ("--sched cosin", "--sched cosin cosine"),
    ("--device rocket", "--device rocket"),
    ("--device meta", "--device meta"),
    ("--device-modules no_such_module_", "--device-modules no_such_module_"),
    ("--amp-dtype float8", "--amp-dtype float8 bfloat16"),
    ("--model-dtype double", "--model-dtype double float32"),
    ("--clip-mode norn", "--clip-mode norn norm"),
    ("--eval-metric top2", "--eval-metric top2 top1"),
    ("--remode noise", "--remode noise pixel"),
    ("--mixup-mode all", "--mixup-mode all batch"),
    ("--train-interpolation cubic", "--train-interpolation cubic bicubic"),
    ("--interpolation random", "--interpolation random bicubic"),
    ("--dist-bn sum", "--dist-bn sum reduce"),
    ("--lr-base-scale log", "--lr-base-scale log sqrt"),
    ("--aa randx-m9", "--aa randx-m9"),
    ("--aa rand-m9-q7", "--aa rand-m9-q7"),
    # rates and counts
    *((f"--{name} {value}", f"--{name} {value} at least 0 and below 1")
      for name in ("drop", "drop-path", "drop-block", "smoothing")
      for value in ("1.0", "-0.1", "nan")),
    *((f"--{name} {value}", f"--{name} {value} between 0 and 1")
      for name in ("mixup-prob", "mixup-switch-prob", "hflip", "vflip", "reprob")
      for value in ("1.5", "-0.1")),
    ("--lr -0.1", "--lr -0.1"),
    ("--lr inf", "--lr inf"),
    ("--weight-decay -1", "--weight-decay -1"),
    ("--batch-size 0", "--batch-size 0"),
    ("--epochs 0", "--epochs 0 least 1"),
    ("--loss zlpr", "--loss zlpr multi-label"),
    ("--loss ce --poly-epsilon 1", "--poly-epsilon --loss poly"),
    ("--stop-epoch 0", "--stop-epoch 0 1 12"),
    ("--stop-epoch 13", "--stop-epoch 13 1 12"),
    ("--sched wsd --lr-decay-fn cosin", "--sched wsd cosin"),
    ("--epochs -1", "--epochs -1"),
    ("--workers -1", "--workers -1"),
    ("--log-interval 0", "--log-interval 0"),
    ("--num-classes 0", "--num-classes 0"),
    ("--img-size 0", "--img-size 0"),
    ("--seed -1", "--seed -1"),
    ("--scale 1.0 0.08", "--scale 1.0 0.08"),
    ("--cutmix-minmax 0.5", "--cutmix-minmax 0.5"),
    ("--mean 0.5 0.5", "--mean 0.5 0.5 3"),
    ("--input-size 3 0 32", "--input-size 0 least 1"),
    ("--decay-milestones 30 20", "--decay-milestones 30 20"),
    # RDP
    ("--rdp --drop-path 0", "--rdp --drop-path 0"),
    ("--rdp-every 2", "--rdp-every 2 --rdp"),
    ("--rdp-every 1", "--rdp-every 1 --rdp"),
    ("--rdp-batch same", "--rdp-batch same --rdp"),
    ("--rdp-start-epoch 3", "--rdp-start-epoch 3 --rdp"),
    ("--rdp-seed 3", "--rdp-seed 3 --rdp"),
    ("--rdp --rdp-every 0", "--rdp-every 0"),
    ("--rdp --rdp-start-epoch -1", "--rdp-start-epoch -1"),
    ("--drop-connect 0.2", "--drop-connect 0.2 --drop-path"),
    # what does not go together
    ("--aug-repeats 3", "--aug-repeats 3 distributed"),
    ("--amp --model-dtype bfloat16", "--amp --model-dtype"),
    ("--sched plateau --sched-on-updates", "plateau --sched-on-updates"),
    ("--mixup 0.8 --batch-size 7", "--batch-size 7 even"),
    ("--mixup 0.8 --mixup-mode half --no-prefetcher", "half --no-prefetcher"),
    ("--wandb-resume-id abc", "--wandb-resume-id --resume"),
    ("--aug-splits 1", "--aug-splits 1 2"),
    ("--jsd-loss", "--jsd-loss --aug-splits"),
    ("--split-bn", "--split-bn --aug-splits --resplit"),
    ("--split-bn --resplit --sync-bn", "--split-bn --sync-bn"),
    ("--aug-splits 2 --mixup 0.8", "--aug-splits 2 --no-prefetcher"),
    ("--aug-splits 2 --no-aug", "--aug-splits --no-aug"),
    ("--aug-splits 2 --naflex-loader", "--aug-splits --naflex-loader"),
    ("--train-img-sizes 32 64 --aug-splits 2", "--train-img-sizes --aug-splits"),
    ("--train-img-sizes 32 64 --naflex-loader", "--train-img-sizes --naflex-loader"),
    ("--train-img-sizes 32 64 --use-multi-epochs-loader", "--use-multi-epochs-loader"),
    ("--naflex-loader --use-multi-epochs-loader", "--use-multi-epochs-loader"),
    ("--train-img-sizes 32 64 --train-batch-sizes 8", "--train-batch-sizes 8 32 64"),
    ("--train-img-sizes 32 --train-batch-sizes 7 --mixup 1", "--train-batch-sizes 7 even"),
    ("--naflex-loader --naflex-patch-sizes 8 16 --naflex-patch-size-probs 1",
     "--naflex-patch-size-probs --naflex-patch-sizes 8 16"),
    ("--torchscript --rdp", "--torchscript --rdp combined"),
    ("--torchscript --sync-bn", "--torchscript --sync-bn"),
    ("--model-kwargs drop_path_rate=0.1", "--model 'drop_path_rate'"),
    ("--opt-kwargs lr=0.1", "--opt 'lr'"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_bad_options_are_refused_in_one_line_that_names_them(refused, argv, words):
    line = refused(*argv.split())
    for word in words.split():
        assert word in line


@pytest.mark.parametrize(
    ("needed", "name"),
    [
        (needed, row["dest"])
        for needed, beginnings in NEEDS.items()
        for row in FLAGS
        if row["dest"].startswith(beginnings) and row["dest"] != needed
    ],
)
def test_a_flag_without_effect_is_refused_rather_than_ignored(refused, needed, name):
    row = next(row for row in FLAGS if row["dest"] == name)
    choices = [c for c in json.loads(row["choices"] or "[]") if c != json.loads(row["default"])]
    value = [] if row["kind"] == "flag" else ["mse" if name == "kd_loss_type" else "1"]
    line = refused(flag(name), *(choices[:1] or value))
    assert flag(name) in line
    if name != "kd_loss_type":  # of which there is only one
        assert f"without {flag(needed)}" in line


def test_rdp_options_in_a_config_need_rdp_unless_they_are_defaults(tmp_path, refused):
    line = refused("-c", config_file(tmp_path, "rdp_every: 2"))
    assert "--rdp-every 2" in line and "without --rdp" in line
    assert parse_args(["-c", str(config_file(tmp_path, "rdp_every: 1"))]).rdp_every == 1


def test_wandb_that_is_asked_for_and_missing_is_an_error(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "wandb" in refused("--log-wandb")


def test_output_that_cannot_be_written_is_found_before_the_run(tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("--output", tmp_path / "file" / "runs")
    assert str(tmp_path / "file") in refused("--output", tmp_path, "--experiment", "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission_is_found_before_the_run(tmp_path, refused):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "permission" in refused("--output", tmp_path / "locked" / "runs")


def test_a_device_that_is_not_here_is_refused_with_one_that_is(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("timm_rdp.training.options.best_device", lambda: "cpu")
    line = refused("--device", "cuda")
    assert "--device cuda" in line and "--device cpu" in line


def test_the_parser_never_shows_more_than_one_line():
    for argv in (["--lr"], ["--lr", "x"], ["a", "b"], ["--input-size", "3"], ["--train-b", "3"]):
        with pytest.raises(UsageError) as error:
            parse_args(argv)
        assert "\n" not in str(error.value)


def test_the_help_shows_every_default_of_timms_that_is_not_off():
    actions = [a for a in build_parser()._actions if a.dest in DEFAULTS]
    shown = {a.dest: a.help % vars(a) for a in reversed(actions)}  # the first of two
    assert len(shown) > 50
    for name, text in shown.items():
        default = DEFAULTS[name]
        if isinstance(default, list):  # as it is typed
            default = " ".join(f"{value:.4g}" for value in default)
        assert f"(default: {default})" in text, name
