"""Loaders are timm's to the bit; data that cannot be used is refused before there is a model."""

import io
import json
import multiprocessing
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from conftest import write_digits
from core_helpers import same_bits
from PIL import Image
from runs import RESNET, VIT, checkpoint, flags, run
from timm import utils
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    NaFlexMixup,
    create_dataset,
    create_loader,
    create_naflex_loader,
    resolve_data_config,
)

from timm_rdp.errors import DataError
from timm_rdp.training import train
from timm_rdp.training.data import close_data, create_data
from timm_rdp.training.dataset import check_data
from timm_rdp.training.model import img_size_kwargs, mixup_active
from timm_rdp.training.options import parse_args

TINY = ["--model", "test_vit", "--img-size", "32", "--num-classes", "10", "-j", "0", "-b", "8"]


def options(folder, *argv):
    args = parse_args([*TINY, "--data-dir", str(folder), *argv])
    args.distributed, args.rank, args.world_size = False, 0, 1
    return args


def loaders(args):
    model = timm.create_model(args.model, num_classes=args.num_classes, **img_size_kwargs(args))
    config = resolve_data_config(vars(args), model=model)
    return create_data(args, config, model, torch.device("cpu"), None)


def assert_same_batches(ours, theirs, seed=0):
    utils.random_seed(seed)
    ours = [(x.clone(), y.clone()) for x, y in ours]
    utils.random_seed(seed)
    count = 0
    for (x, y), (timms_x, timms_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, timms_x) and torch.equal(y, timms_y)
        count += 1
    assert count


MIXING = ["--mixup", "0.8", "--cutmix", "1.0", "--smoothing", "0.2"]


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm's own loader leaves images open
@pytest.mark.parametrize(
    ("argv", "train_kwargs", "mixup"),
    [
        ([], dict(interpolation="random"), None),
        (["--no-aug"], dict(no_aug=True, interpolation="bicubic"), None),
        (
            ["--aa", "rand-m9-mstd0.5", "--reprob", "0.7", "--recount", "2", "--vflip", "0.5"],
            dict(auto_augment="rand-m9-mstd0.5", re_prob=0.7, re_count=2, vflip=0.5),
            None,
        ),
        (
            ["--hflip", "0", "--scale", "0.5", "1", "--color-jitter", "0", "--grayscale-prob", "1"],
            dict(hflip=0.0, scale=[0.5, 1.0], color_jitter=0.0, grayscale_prob=1.0),
            None,
        ),
        (MIXING, {}, "collate"),
        ([*MIXING, "--no-prefetcher", "--reprob", "0.5"], dict(re_prob=0.5), "loop"),
        (["-j", "2"], dict(num_workers=2), None),
    ],
    ids=["default", "no-aug", "randaugment", "crop", "mixup", "mixup-no-prefetcher", "workers"],
)  # fmt: skip
def test_batches_are_timms_to_the_bit(digits_folder, argv, train_kwargs, mixup):
    args = options(digits_folder, *argv)
    data = loaders(args)

    mix = dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.2, num_classes=10)
    common = dict(
        input_size=(3, 32, 32),
        batch_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        device=torch.device("cpu"),
        use_prefetcher=mixup != "loop",
    )
    kwargs = dict(num_workers=0, interpolation="random", re_mode="pixel", **common)
    kwargs["collate_fn"] = FastCollateMixup(**mix) if mixup == "collate" else None
    train = create_loader(
        create_dataset("", root=str(digits_folder), split="train"),
        is_training=True,
        **{**kwargs, **train_kwargs},
    )
    assert_same_batches(data.train, train)
    validation = create_loader(
        create_dataset("", root=str(digits_folder), split="validation"),
        interpolation="bicubic",
        crop_pct=0.95,
        num_workers=0,
        **common,
    )
    assert_same_batches(data.eval, validation)
    assert mixup_active(args) == bool(mixup)
    assert (type(data.mixup_fn) is Mixup) == (mixup == "loop")


def same_data(argv, folder, train, model="test_resnet"):
    """Make our loader by `argv` and compare it with `train`, epoch by epoch."""
    args = options(folder, "--model", model, *argv)
    data = loaders(args)
    for epoch in range(2):
        for loader in (data.train, train):
            for part in (loader.dataset, loader.batch_sampler):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
        utils.random_seed(epoch)
        ours = list(data.train)
        utils.random_seed(epoch)
        theirs = list(train)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    return data


def timms(folder, split="train"):
    return create_dataset("", root=str(folder), split=split)


COMMON = dict(
    is_training=True,
    batch_size=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="random",
    re_mode="pixel",
    num_workers=0,
    device=torch.device("cpu"),
)


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_scheduled_sizes_are_timms_to_the_bit(digits_folder):
    train = create_loader(
        timms(digits_folder),
        input_size=(3, 32, 32),
        input_size_choices=[32, 48],
        batch_size_choices=[8, 4],
        batch_choice_weights=[1.0, 2.0],
        batch_choice_seed=42,
        batch_choice_schedule="progressive",
        batch_schedule_epochs=300,
        num_batches=7,
        **COMMON,
    )
    argv = ["--train-img-sizes", "32", "48", "--train-batch-sizes", "8", "4"]
    argv += ["--train-size-probs", "1", "2"]
    argv += ["--train-size-schedule", "progressive", "--train-batches-per-epoch", "7"]
    data = same_data(argv, digits_folder, train)
    assert data.batch_size_reference == train.batch_sampler.average_batch_size


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_augmentation_splits_are_timms_to_the_bit(digits_folder):
    train = create_loader(
        AugMixDataset(timms(digits_folder), num_splits=3),
        input_size=(3, 32, 32),
        auto_augment="augmix-m5",
        num_aug_splits=3,
        re_prob=0.5,
        re_split=True,
        **COMMON,
    )
    argv = ["--aug-splits", "3", "--aa", "augmix-m5", "--reprob", "0.5", "--resplit"]
    data = same_data(argv, digits_folder, train)
    images, _ = next(iter(data.train))
    assert len(images) == 3 * 8


NAFLEX = ["--naflex-loader", "--naflex-train-seq-lens", "4", "9", "--naflex-max-seq-len", "9"]
SMALL_NAFLEX = ["--model-kwargs", "depth=1", "embed_dim=32", "num_heads=2"]


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("varied", [False, True], ids=["one patch size", "two patch sizes"])
def test_naflex_batches_are_timms_to_the_bit(digits_folder, monkeypatch, varied):
    monkeypatch.setattr("timm.create_model", small_naflex(timm.create_model, varied))
    patches = dict(patch_size_choices=[8, 16]) if varied else dict(patch_size=(16, 16))
    mix = dict(mixup_alpha=0.8, cutmix_alpha=0.0, prob=1.0, switch_prob=0.5, num_classes=10)
    train = create_naflex_loader(
        timms(digits_folder),
        train_seq_lens=[4, 9],
        mixup_fn=NaFlexMixup(label_smoothing=0.1, **mix),
        pin_memory=False,
        **patches,
        **COMMON,
    )
    argv = [*NAFLEX, "--mixup", "0.8"] + ["--naflex-patch-sizes", "8", "16"] * varied
    data = same_data(argv, digits_folder, train, model="naflexvit_base_patch16_gap")
    batch, _ = next(iter(data.eval))
    assert batch["patches"].shape[1] == 9


def small_naflex(create_model, varied):
    def create(name, **kwargs):
        if name.startswith("naflexvit"):
            kwargs |= dict(depth=1, embed_dim=32, num_heads=2, enable_patch_interpolator=varied)
        return create_model(name, **kwargs)

    return create


def test_a_model_that_does_not_take_the_batches_is_refused(digits_folder, refused):
    data = ["--data-dir", digits_folder, "--num-classes", "10", "-b", "8", "-j", "0"]
    assert "test_resnet" in refused(*data, "--model", "test_resnet", *NAFLEX)
    vit = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "depth=1"]
    line = refused(*data, *vit, "--train-img-sizes", "32", "48")
    assert "--train-img-sizes 48" in line
    model = ["--model", "naflexvit_base_patch16_gap", *SMALL_NAFLEX]
    line = refused(*data, *model, *NAFLEX, "--naflex-patch-sizes", "8", "16")
    assert "--naflex-patch-sizes 8" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model efficientformer_l1 --img-size 256", "efficientformer_l1 (its own: 224 x 224)"),
        ("--model vit_tiny_patch16_224 --img-size 8", "vit_tiny_patch16_224 (its own: 224 x 224)"),
        (
            "--model vit_tiny_patch16_224 --img-size 40 --model-kwargs depth=1 "
            "dynamic_img_size=True",
            "8 x 3 x 40 x 40",
        ),
        ("--model test_resnet --model-kwargs features_only=True", "test_resnet"),
        ("--model test_vit --img-size 32 --gp bogus", "test_vit pooling"),
        ("--model test_resnet --gp fast --img-size 32 --model-kwargs global_pool=", "global_pool"),
        ("--model resnet18 --img-size 32 -b 1", "resnet18 batches of 1 x 3 x 32 x 32"),
    ],
)
def test_a_batch_is_tried_before_anything_is_written(digits_folder, refused, argv, words):
    data = ["--data-dir", digits_folder, "--num-classes", "10", "-b", "8", "-j", "0"]
    line = refused(*data, *argv.split())
    for word in words.split():
        assert word in line


def test_the_batch_on_trial_moves_no_bit(digits_folder, tmp_path, monkeypatch):
    argv = (*RESNET, "--drop", 0.2, "--mixup", 0.5, "--no-prefetcher", "--reprob", 0.5)
    tried = run(digits_folder, tmp_path / "tried", *argv)
    monkeypatch.setattr("timm_rdp.training.setup.try_batch", lambda *_: None)
    untried = run(digits_folder, tmp_path / "untried", *argv)
    assert (tried / "summary.csv").read_bytes() == (untried / "summary.csv").read_bytes()
    weights = [checkpoint(folder)["state_dict"] for folder in (tried, untried)]
    assert same_bits(*map(dict, weights))


def test_making_the_loaders_moves_no_random_state(digits_folder):
    args = options(digits_folder)
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    config = resolve_data_config(vars(args), model=model)
    before = torch.get_rng_state()
    create_data(args, config, model, torch.device("cpu"), None)
    assert torch.equal(torch.get_rng_state(), before)


def classes(args):
    return len(loaders(args).train.dataset.reader.class_to_idx)


def test_without_a_validation_split_there_is_no_eval_loader(digits_folder):
    args = options(digits_folder, "--val-split", "")
    check_data(args)
    assert loaders(args).eval is None and classes(args) == 10


@pytest.mark.parametrize("names", [("training", "valid"), ("train", "val"), ("train", "eval")])
def test_splits_are_found_under_all_of_timms_names(digits_folder, tmp_path, names):
    for ours, name in zip(("train", "validation"), names, strict=True):
        shutil.copytree(digits_folder / ours, tmp_path / name)
    args = options(tmp_path)
    check_data(args)
    data = loaders(args)
    assert (len(data.train.dataset), len(data.eval.dataset)) == (80, 40) and classes(args) == 10


def test_a_folder_without_splits_is_used_for_both_as_timm_does_and_says_so(digits_folder, caplog):
    args = options(digits_folder / "train")
    check_data(args)
    assert "validation sees the images of training" in caplog.text
    assert len(loaders(args).eval.dataset) == 80 and classes(args) == 10


def test_a_class_map_decides_the_classes(digits_folder, tmp_path):
    (tmp_path / "map.txt").write_text("3\n5\n")
    args = options(digits_folder, "--class-map", str(tmp_path / "map.txt"), "--num-classes", "2")
    check_data(args)
    assert len(loaders(args).train.dataset) == 16 and classes(args) == 2


def test_data_folder_that_is_missing_or_empty_is_named(tmp_path, refused):
    assert str(tmp_path / "no") in refused(*TINY, "--data-dir", tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(*TINY, "--data-dir", tmp_path / "empty")


def test_a_split_that_is_missing_is_named(digits_folder, tmp_path, refused):
    shutil.copytree(digits_folder / "train", tmp_path / "a" / "train")
    line = refused(*TINY, "--data-dir", tmp_path / "a")
    assert "--val-split validation" in line and str(tmp_path / "a") in line
    shutil.copytree(digits_folder / "validation", tmp_path / "b" / "validation")
    line = refused(*TINY, "--data-dir", tmp_path / "b")
    assert "--train-split train" in line and str(tmp_path / "b") in line


def test_a_split_without_images_is_named(digits_folder, tmp_path, refused):
    shutil.copytree(digits_folder / "train", tmp_path / "train")
    (tmp_path / "validation" / "0").mkdir(parents=True)
    (tmp_path / "validation" / "0" / "notes.txt").write_text("")
    line = refused(*TINY, "--data-dir", tmp_path)
    assert str(tmp_path / "validation") in line and "0 images" in line


def test_split_names_without_folders_are_refused_together_too(digits_folder, refused):
    argv = ["--train-split", "trian", "--val-split", "validaiton", "--data-dir", digits_folder]
    line = refused(*TINY, *argv)
    assert "--train-split trian" in line


def test_folders_that_are_a_class_by_accident_or_none_are_named(tmp_path, refused):
    write_digits(tmp_path / "a", [0, 1])
    for split in ("train", "validation"):
        shutil.copytree(tmp_path / "a" / split / "1", tmp_path / "a" / split / ".ipynb_checkpoints")
    line = refused(*TINY, "--num-classes", "2", "--data-dir", tmp_path / "a")
    assert ".ipynb_checkpoints" in line
    write_digits(tmp_path / "b", [0, 1])
    for split in ("train", "validation"):
        (tmp_path / "b" / split / "2").mkdir()
        (tmp_path / "b" / split / "2" / "x.webp").write_bytes(b"")
    line = refused(*TINY, "--num-classes", "2", "--data-dir", tmp_path / "b")
    assert str(tmp_path / "b" / "train" / "2") in line and "x.webp" in line and ".png" in line


def test_a_class_map_that_fits_no_folder_is_named(digits_folder, tmp_path, refused):
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    argv = ["--class-map", tmp_path / "map.txt", "--num-classes", "2"]
    assert "map.txt" in refused(*TINY, *argv, "--data-dir", digits_folder)


def test_outputs_that_no_class_uses_are_logged_once(digits_folder, caplog):
    caplog.set_level("INFO")
    loaders(options(digits_folder, "--num-classes", "12"))
    assert [r.message for r in caplog.records if "12 outputs for 10 classes" in r.message]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Images of each mode of PIL, as class folders."""
    root, noise = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for mode in ("RGB", "RGBA", "CMYK", "L", "P"):
        for index in range(8):
            pixels = Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            for split in ("train", "validation"):
                folder = root / mode / split / "ab"[index % 2]
                folder.mkdir(parents=True, exist_ok=True)
                pixels.convert(mode).save(folder / f"{index}.{'jpg' if mode == 'CMYK' else 'png'}")
    return root


@pytest.mark.parametrize("prefetcher", [(), ("--no-prefetcher",)])
@pytest.mark.parametrize(
    ("mode", "argv"),
    [
        ("RGBA", "--in-chans 4"),
        ("CMYK", "--in-chans 4 --input-img-mode CMYK"),
        ("L", "--in-chans 1"),
        ("L", ""),
        ("RGB", "--in-chans 1"),
        ("CMYK", ""),
        ("P", ""),
        ("P", "--in-chans 1"),
        ("RGB", "--mean 0.5 --std 0.25"),
        ("L", "--in-chans 2 --input-img-mode LA"),
    ],
)
def test_images_of_any_mode_train(coloured, tmp_path, mode, argv, prefetcher):
    flags = ["--num-classes", "2", "-b", "4", "--epochs", "1", *argv.split(), *prefetcher]
    run(coloured / mode, tmp_path, *RESNET, *flags)


def test_images_of_the_models_own_size_have_the_channels_that_were_asked_for(coloured, tmp_path):
    flags = ["--in-chans", "1", "--num-classes", "2", "-b", "4", "--epochs", "1"]
    run(coloured / "L", tmp_path, "--model", "test_vit", *flags)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--input-img-mode L", "--input-img-mode L --in-chans 1"),
        ("--in-chans 1 --input-img-mode RGB", "--input-img-mode RGB --in-chans 3"),
        ("--input-size 3 32 32 --in-chans 1", "--in-chans 1 --input-size 3 32 32"),
        ("--in-chans 2", "--in-chans 2 --input-img-mode"),
        ("--input-img-mode BOGUS", "--input-img-mode BOGUS"),
        ("--in-chans 1 --mean 0.5 0.5 0.5", "--mean 0.5"),
    ],
)
def test_channels_that_disagree_name_the_option_to_give(coloured, refused, argv, words):
    data = ["--data-dir", coloured / "RGB", "--num-classes", "2", "-b", "4", "-j", "0"]
    line = refused(*data, *RESNET, *argv.split())
    for word in words.split():
        assert word in line


def test_posterizing_to_nothing_gives_a_black_image(digits_folder):
    data = loaders(options(digits_folder, "--aa", "rand-m10-n4-inc1"))
    assert len([data.train.loader.dataset[index % 80] for index in range(400)]) == 400


def test_splits_of_different_classes_are_refused(tmp_path, refused):
    write_digits(tmp_path, [0, 1, 2])
    shutil.rmtree(tmp_path / "validation" / "1")
    line = refused(*TINY, "--num-classes", "3", "--data-dir", tmp_path)
    assert "same classes" in line and "(1)" in line and "validation" in line
    write_digits(tmp_path / "b", [0, 1])
    (tmp_path / "b" / "train" / "1").rename(tmp_path / "b" / "train" / "one")
    line = refused(*TINY, "--num-classes", "2", "--data-dir", tmp_path / "b")
    assert "same classes" in line and "(one)" in line


def test_class_count_that_does_not_fit_num_classes_is_refused(digits_folder, refused):
    for count in ("9", "11"):
        line = refused(*TINY, "--data-dir", digits_folder, "--num-classes", count)
        assert f"--num-classes {count}" in line and "--num-classes 10" in line


def test_more_classes_than_the_model_has_outputs_are_refused(digits_folder, tmp_path, refused):
    image = next((digits_folder / "train" / "0").iterdir()).read_bytes()
    for split in ("train", "validation"):
        for name in range(1001):
            (tmp_path / split / str(name)).mkdir(parents=True)
            (tmp_path / split / str(name) / "0.png").write_bytes(image)
    line = refused("--model", "test_vit", "--img-size", "32", "--data-dir", tmp_path)
    assert "1001 classes" in line and "1000 outputs" in line and "--num-classes 1001" in line


def test_without_num_classes_the_models_own_number_stays_as_in_timm(digits_folder):
    args = options(digits_folder)
    args.num_classes = None
    check_data(args)
    assert args.num_classes is None


def test_a_data_set_that_cannot_be_made_is_one_line(tmp_path, refused):
    line = refused(*TINY, "--dataset", "torch/nothing", "--data-dir", tmp_path)
    assert "torch/nothing" in line
    assert "torch/cifar10" in refused(*TINY, "--dataset", "torch/cifar10", "--data-dir", tmp_path)
    assert "--data-dir" in refused(*TINY, "--dataset", "folder")


def test_a_batch_larger_than_the_data_is_refused(digits_folder, refused):
    line = refused(*TINY, "--data-dir", digits_folder, "-b", "81")
    assert "--batch-size 81" in line and "80" in line


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("damage", ["truncated", "text", "gone", "broken chunk"])
def test_an_unreadable_image_names_its_file(tmp_path, damage, workers):
    write_digits(tmp_path, [0, 1])
    victim = sorted((tmp_path / "train" / "1").iterdir())[3]
    content = victim.read_bytes()
    args = options(tmp_path, "--num-classes", "2", "-j", workers)
    data = loaders(args)
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        victim.write_text("not an image")
    elif damage == "broken chunk":
        victim.write_bytes(content.replace(b"IDAT", b"ID\0T"))
    else:
        victim.unlink()
    with pytest.raises(DataError) as error:
        for _ in data.train:
            pass
    close_data(data)
    assert not multiprocessing.active_children()
    assert str(victim) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_image_stops_the_command_with_one_line(tmp_path, capsys):
    from timm_rdp.training.train import main

    write_digits(tmp_path / "data", [0, 1])
    victim = sorted((tmp_path / "data" / "train" / "1").iterdir())[0]
    victim.write_bytes(b"")
    argv = [*TINY, "--data-dir", str(tmp_path / "data"), "--num-classes", "2", "--epochs", "1"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(victim) in err


@pytest.mark.parametrize(
    ("model", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", 64, {"img_size": (64, 64)}),
        ("swin_tiny_patch4_window7_224", 112, {"img_size": (112, 112)}),
        ("mixer_s16_224", 64, {"img_size": (64, 64)}),
        ("vit_tiny_patch16_224", 224, {}),  # its own size
        ("resnet18", 64, {}),  # takes any size
        ("convnext_atto", 64, {}),
    ],
)
def test_img_size_also_works_for_models_of_fixed_input_size(digits_folder, model, size, kwargs):
    args = options(digits_folder, "--model", model, "--img-size", str(size))
    before = torch.get_rng_state()
    assert img_size_kwargs(args) == kwargs
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        net = timm.create_model(model, num_classes=10, **img_size_kwargs(args))
        assert net(torch.empty(2, 3, size, size)).shape == (2, 10)


def test_input_size_sets_height_and_width_apart(digits_folder):
    args = options(
        digits_folder, "--model", "vit_tiny_patch16_224", "--input-size", "1", "32", "64"
    )
    assert img_size_kwargs(args) == {"img_size": (32, 64)}
    args = options(digits_folder, "--model-kwargs", "dynamic_img_size=True")
    assert img_size_kwargs(args) == {}


# Data sets that are gone through and not looked up.

LEFT_OPEN = pytest.mark.filterwarnings(  # webdataset's shards, by its generators
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def write_shards(folder, labels=10, leave_out=()):
    """32 images a split, as webdataset's shards."""
    folder.mkdir()
    splits = {}
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for i in range(32):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (i * 7, 0, 0)).save(image, "png")
                label = i % labels
                sample = {"png": image.getvalue(), "cls": str(label).encode()}
                sample["json"] = json.dumps({"label": label}).encode()
                for kind, content in sample.items():
                    entry = tarfile.TarInfo(f"{i:04d}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        info = {"name": split, "num_samples": 32, "shard_lengths": [32]}
        info["filenames"] = [f"{split}-0.tar"]
        splits[split] = {k: v for k, v in info.items() if k not in leave_out}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


@LEFT_OPEN
@pytest.mark.parametrize(
    ("shards", "more", "expected"),
    [
        ({"leave_out": ["num_samples"]}, [], "'num_samples' is missing"),
        ({}, ["--target-key", "nope"], "['nope'] not found in the json sidecar"),
        ({}, ["--train-split", "nope"], "split nope not found"),
    ],
    ids=["info", "target key", "split"],
)
def test_shards_that_cannot_be_read_are_refused_before_anything_is_written(
    shards, more, expected, tmp_path, refused
):
    pytest.importorskip("webdataset")
    write_shards(tmp_path / "shards", **shards)
    data = ["--dataset", "wds/shards", "--data-dir", tmp_path / "shards", "--num-classes", 10]
    line = refused(*VIT, *data, "-j", 0, "-b", 8, *more)
    assert "--dataset wds/shards" in line and expected in line


@LEFT_OPEN
@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_beyond_the_outputs_is_one_line_in_an_iterable_data_set(workers, tmp_path, capsys):
    pytest.importorskip("webdataset")
    write_shards(tmp_path / "shards", labels=20)
    more = ["--dataset", "wds/shards", "-j", workers, "-b", 8]
    assert train.main(flags(tmp_path / "shards", tmp_path, *VIT, *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "wds/shards (split train)" in line and "10 outputs: give --num-classes" in line


def test_a_label_beyond_the_outputs_is_one_line_in_a_table(digits_folder, tmp_path, capsys):
    import datasets

    file = next((digits_folder / "train").rglob("*.png"))
    image = {"bytes": file.read_bytes(), "path": file.name}
    for split in ("train", "validation"):
        data = {"image": [image] * 16, "label": [*range(16)]}
        table = datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / "table" / f"{split}.parquet")
    more = ["--dataset", f"hfds/{tmp_path / 'table'}", "-b", 8]
    assert train.main(flags(tmp_path / "cache", tmp_path, *VIT, *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "has the label 1" in line and "10 outputs" in line
