"""`timm-rdp features`: what is observed, what is measured, what is written, bad input."""

import argparse
import csv
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import write_digits
from timm.layers import DropPath
from torch.utils.data import DataLoader

from timm_rdp.study.features import layers, models
from timm_rdp.study.features import main as features
from timm_rdp.study.features.similarity import cka_matrix, effective_rank

SMALL = ["--img-size", "64", "--num-images", "20", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=10, drop_path_rate=0.1).eval()
    return model, models.find_paths("test_vit", model, (3, 64, 64))


def images_of(folder, count=20):
    cfg = timm.get_pretrained_cfg("test_vit")
    look = {"mean": cfg.mean, "std": cfg.std, "interpolation": cfg.interpolation}
    transform = timm.data.create_transform((3, 64, 64), crop_pct=1.0, **look)
    images, _ = models.choose_images(str(folder), count, 0)
    images.dataset.transform = transform
    return next(iter(DataLoader(images, count)))


def save_checkpoint(path, seed, model="test_vit", **extra):
    torch.manual_seed(seed)
    net = timm.create_model(model, num_classes=10)
    args = argparse.Namespace(model=model, img_size=64, num_classes=10, crop_pct=1.0)
    content = {"epoch": 1, "arch": model, "args": args, "state_dict": net.state_dict(), **extra}
    torch.save(content, path)
    return str(path)


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_block_has_paths_also_the_first_whose_rate_is_zero(vit):
    model, paths = vit
    expected = [f"blocks.{i}.drop_path{j}" for i in range(len(model.blocks)) for j in (1, 2)]
    assert [path.name for path in paths] == expected
    assert list(layers.choose(model, paths, None)[1]) == [
        f"blocks.{i}" for i in range(len(model.blocks))
    ]
    assert all(type(path.module) is DropPath for path in paths)  # nothing is left patched


def test_observed_features_equal_the_blocks_computed_by_hand(vit, digits_folder):
    model, paths = vit
    x, _ = images_of(digits_folder)
    output, found = layers.run_observed(model, x, paths, layers.choose(model, paths, None)[1])
    with torch.no_grad():
        assert torch.equal(output, model(x))
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    assert next(iter(found)) == ("blocks", layers.INPUT)
    torch.testing.assert_close(found["blocks", layers.INPUT], tokens.mean(1).detach())
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            first = block.ls1(block.attn(block.norm1(tokens)))
            second = block.ls2(block.mlp(block.norm2(tokens + first)))
            tokens = tokens + first + second
            for name, value in ((f"drop_path{j + 1}", v) for j, v in enumerate((first, second))):
                pooled = found["paths", f"blocks.{i}.{name}"]
                torch.testing.assert_close(pooled, value.mean(1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found["blocks", f"blocks.{i}"], tokens.mean(1), rtol=1e-4, atol=1e-5
            )


def test_observing_leaves_no_hook_behind(vit):
    model, paths = vit
    observe = lambda x: layers.run_observed(model, x, paths, layers.choose(model, paths, None)[1])
    observe(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError):
        observe(torch.zeros(1, 1, 1))
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(a or b for a, b in hooks)


def test_a_module_called_twice_gives_two_layers():
    torch.manual_seed(0)
    model = timm.create_model(
        "resmlp_12_224", img_size=32, num_classes=4, drop_path_rate=0.1
    ).eval()
    paths = models.find_paths("resmlp_12_224", model, (3, 32, 32))
    _, found = layers.run_observed(model, torch.randn(4, 3, 32, 32), paths, {})
    names = [path.name for path in paths]
    assert names[:2] == ["blocks.0.drop_path#0", "blocks.0.drop_path#1"]
    assert list(found) == [("paths", name) for name in names]
    assert not torch.equal(found["paths", names[0]], found["paths", names[1]])


def test_channels_stay_and_positions_are_pooled_in_every_layout():
    x = torch.randn(2, 5, 3, 3)
    expected = x.mean((2, 3))
    torch.testing.assert_close(layers.pool_features(x, 2), expected)
    torch.testing.assert_close(layers.pool_features(x.permute(0, 2, 3, 1), 2), expected)
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(layers.pool_features(tokens, 2), expected)
    assert torch.equal(layers.pool_features(tokens, 2, "first"), tokens[:, 0])
    assert torch.equal(layers.pool_features(tokens, 2, "max"), tokens.amax(1))
    windows = tokens.reshape(6, 3, 5)  # three windows a sample
    torch.testing.assert_close(layers.pool_features(windows, 2), expected)
    assert layers.pool_features(tokens, 4) is None  # the first dimension does not count samples


def test_a_dropped_path_contributes_exactly_zero(vit, digits_folder):
    model, paths = vit
    x, _ = images_of(digits_folder)
    path = next(p for p in paths if p.name == "blocks.2.drop_path2")
    scale = model.blocks[2].mlp.fc2
    with torch.no_grad():
        untouched = model(x)
        with layers.dropped(model, path):
            first, again = model(x), model(x)
        kept = {n: p.clone() for n, p in scale.named_parameters()}
        for parameter in scale.parameters():
            parameter.zero_()
        by_hand = model(x)
        for name, parameter in scale.named_parameters():
            parameter.copy_(kept[name])
        assert torch.equal(first, by_hand) and torch.equal(first, again)
        assert not torch.equal(first, untouched)
        assert torch.equal(model(x), untouched)


def test_only_the_chosen_call_of_a_shared_module_is_dropped():
    torch.manual_seed(0)
    model = timm.create_model(
        "resmlp_12_224", img_size=32, num_classes=4, drop_path_rate=0.1
    ).eval()
    for block in model.blocks:  # layer scale starts near zero and would hide a dropped path
        block.ls1.data.fill_(1)
        block.ls2.data.fill_(1)
    paths = models.find_paths("resmlp_12_224", model, (3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        with layers.dropped(model, paths[3]):
            dropped = model(x)
        model.blocks[1].ls2.zero_()
        torch.testing.assert_close(dropped, model(x))


def test_end_to_end_numbers_equal_those_computed_without_the_tool(digits_folder, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "last.pth.tar", seed=5)
    argv = ["--model", "test_vit", "--checkpoint", checkpoint, "--data-dir", str(digits_folder)]
    argv += ["--num-images", "20", "--batch-size", "8", "--output", str(tmp_path / "out")]
    assert features.main(argv) == 0
    output = tmp_path / "out"
    names = {"similarity", "importance"}
    expected = {f"{n}.{e}" for n in names for e in ("png", "csv")}
    assert {p.name for p in output.iterdir()} == expected | {
        "rank.png",
        "layers.csv",
        "summary.txt",
    }

    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=10).eval()
    x, y = images_of(digits_folder)
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: kept.append(out.mean(1)))
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y).item()
    cka = cka_matrix(kept, unbiased=True)
    rows = read_csv(output / "similarity.csv")
    for row in rows:
        if row["layers"] == "blocks" and row["number"] != "0" and row["other_number"] != "0":
            by_hand = cka[int(row["number"]) - 1, int(row["other_number"]) - 1].item()
            assert float(row["cka"]) == pytest.approx(by_hand, abs=1e-4)
    ranks = [r for r in read_csv(output / "layers.csv") if r["layers"] == "blocks"][1:]
    for row, layer in zip(ranks, kept, strict=True):
        assert float(row["effective_rank"]) == pytest.approx(effective_rank(layer), rel=1e-3)
    summary = (output / "summary.txt").read_text()
    assert f"loss {loss:.4f}" in summary and summary in capsys.readouterr().out

    with torch.no_grad():  # path importance, one path by hand
        for parameter in model.blocks[1].attn.proj.parameters():
            parameter.zero_()
        without = F.cross_entropy(model(x), y).item()
    rows = {r["path"]: r for r in read_csv(output / "importance.csv")}
    assert len(rows) == 2 * len(model.blocks)
    assert float(rows["blocks.1.drop_path1"]["loss"]) == pytest.approx(without, abs=1e-4)
    assert float(rows["blocks.1.drop_path1"]["loss_rise"]) == pytest.approx(
        without - loss, abs=1e-4
    )


def test_batch_size_changes_nothing(digits_folder, tmp_path):
    tables = []
    for size in ("7", "20"):
        output = tmp_path / size
        argv = ["--model", "test_resnet", "--data-dir", str(digits_folder), *SMALL]
        assert features.main([*argv, "--batch-size", size, "--output", str(output)]) == 0
        tables.append([float(row["cka"]) for row in read_csv(output / "similarity.csv")])
    assert tables[0] == pytest.approx(tables[1], abs=1e-4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    write_digits(tmp_path / "data", range(10), val=33)
    program = (
        "import sys, resource\n"
        "from timm_rdp.study.features.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    argv = ["--model", "vit_tiny_patch16_224", "--data-dir", str(tmp_path / "data")]
    argv += ["--no-importance", "--device", "cpu", "--output", str(tmp_path / "out")]
    peaks = []
    for images in ("64", "320"):
        run = subprocess.run(
            [sys.executable, "-c", program, *argv, "--num-images", images],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(run.stdout.split()[-1]) / 1024)
    # 256 images more: 8 MB of pooled features, but 1.4 GB of what the layers put out.
    assert peaks[1] - peaks[0] < 200, peaks


def test_several_checkpoints_lie_side_by_side(digits_folder, tmp_path):
    ema = timm.create_model("test_vit", num_classes=10).state_dict()
    one = tmp_path / "one" / "last.pth.tar"
    two = tmp_path / "two" / "last.pth.tar"
    one.parent.mkdir(), two.parent.mkdir()
    paths = [save_checkpoint(one, 1), save_checkpoint(two, 2, state_dict_ema=ema)]
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), "--num-images", "16"]
    argv += ["--no-importance", "--checkpoint", *paths]
    assert features.main([*argv, "--output", str(tmp_path / "out")]) == 0
    rows = read_csv(tmp_path / "out" / "layers.csv")
    assert {row["network"] for row in rows} == {"one", "two"}
    assert not (tmp_path / "out" / "importance.csv").exists()


def test_ema_weights_are_taken_on_request_only(tmp_path):
    ema = {"x": torch.ones(1)}
    path = save_checkpoint(tmp_path / "c.pth.tar", 1, state_dict_ema=ema)
    assert models.read_source(path, "test_vit", True, "").weights.keys() == {"x"}
    assert len(models.read_source(path, "test_vit", False, "").weights) > 1


def test_layers_can_be_chosen_by_name_and_pattern(vit):
    model, paths = vit
    chosen, modules = layers.choose(model, paths, ["blocks.*.drop_path1", "blocks.0.mlp"])
    assert [p.name for p in chosen] == [p.name for p in paths if p.name.endswith("1")]
    assert list(modules) == ["blocks.0.mlp"]


def test_images_are_a_function_of_the_seed_and_taken_from_validation(digits_folder):
    choose = lambda count, seed: models.choose_images(str(digits_folder), count, seed)
    (one, classes), (two, _), (three, _) = choose(16, 0), choose(16, 0), choose(16, 1)
    assert classes == 10 and len(one) == 16
    assert one.indices == two.indices != three.indices
    assert len(choose(1000, 0)[0]) == 40


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_as_many_channels_as_the_network_takes(channels, digits_folder, tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=10, in_chans=channels).eval()
    args = argparse.Namespace(model="test_vit", num_classes=10, in_chans=channels, crop_pct=1.0)
    content = {"args": args, "state_dict": model.state_dict()}
    torch.save(content, tmp_path / "c.pth")
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), "--num-images", "20"]
    argv += ["--checkpoint", str(tmp_path / "c.pth"), "--no-importance", "--device", "cpu"]
    assert features.main([*argv, "--output", str(tmp_path / "out")]) == 0
    images, _ = models.choose_images(str(digits_folder), 20, 0)
    images.dataset.input_img_mode = {1: "L", 4: "RGBA"}[channels]
    size = (channels, 160, 160)
    images.dataset.transform = timm.data.create_transform(
        size, crop_pct=1.0, interpolation="bicubic", mean=(0.5,) * channels, std=(0.5,) * channels
    )
    x, y = next(iter(DataLoader(images, 20)))
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y).item()
    assert f"loss {loss:.4f}" in (tmp_path / "out" / "summary.txt").read_text()


def test_channels_that_no_image_has_are_refused(digits_folder, tmp_path, capsys):
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), *SMALL]
    assert "--in-chans 5: images have 1, 3 or 4" in refused(
        capsys, tmp_path, *argv, "--in-chans", "5"
    )


def refused(capsys, tmp_path, *argv: str) -> str:
    """The one line with which `features` refuses its input; nothing is written."""
    output = tmp_path / "never"
    assert features.main([*argv, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]  # a progress bar may come before
    assert line.startswith("error: ") and "Traceback" not in error
    assert not output.exists()
    return line


def test_a_checkpoint_of_another_model_is_refused(digits_folder, tmp_path, capsys):
    other = save_checkpoint(tmp_path / "other.pth.tar", 0, model="test_vit2")
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), "--checkpoint"]
    assert "is of test_vit2, not of --model test_vit" in refused(capsys, tmp_path, *argv, other)
    bare = tmp_path / "bare.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), bare)
    line = refused(capsys, tmp_path, *argv, str(bare))
    assert "does not fit --model test_vit" in line and "are missing, unknown or of" in line


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None, {"epoch": 3}])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path, capsys, digits_folder):
    path = tmp_path / "file.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), "--checkpoint", str(path)]
    assert f"--checkpoint {path}" in refused(capsys, tmp_path, *argv)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg11", "takes no drop_path_rate"),
        ("lcnet_050", "no residual path"),
        ("vit_tinny_patch16_224", "did you mean"),
    ],
)
def test_a_model_without_paths_or_without_existence_is_refused(
    name, words, digits_folder, tmp_path, capsys
):
    line = refused(capsys, tmp_path, "--model", name, "--data-dir", str(digits_folder))
    assert f"--model {name}" in line and words in line


def test_an_unreadable_image_is_named(tmp_path, capsys):
    write_digits(tmp_path / "data", range(5))
    broken = sorted((tmp_path / "data" / "validation" / "3").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:40])
    argv = ["--model", "test_vit", "--data-dir", str(tmp_path / "data"), *SMALL]
    assert str(broken) in refused(capsys, tmp_path, *argv)


def test_too_few_images_for_cka_are_refused(tmp_path, capsys):
    write_digits(tmp_path / "data", range(3))  # 12 validation images
    argv = ["--model", "test_vit", "--data-dir", str(tmp_path / "data")]
    assert "has 12 validation images: too few" in refused(capsys, tmp_path, *argv)
    assert "--num-images 5 must be a whole number of at least 16" in refused(
        capsys, tmp_path, *argv, "--num-images", "5"
    )


def test_an_unknown_layer_is_refused_with_the_nearest_names(digits_folder, tmp_path, capsys):
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), *SMALL]
    line = refused(capsys, tmp_path, *argv, "--layers", "blocks.1.droppath1")
    assert "--layers blocks.1.droppath1" in line and "blocks.1.drop_path1" in line


def test_images_of_other_classes_than_the_checkpoints_are_refused(tmp_path, capsys):
    write_digits(tmp_path / "data", range(5))
    checkpoint = save_checkpoint(tmp_path / "c.pth.tar", 0)
    argv = ["--model", "test_vit", "--data-dir", str(tmp_path / "data"), "--checkpoint", checkpoint]
    line = refused(capsys, tmp_path, *argv)
    assert (
        "with 10 classes" in line and "classification with 5" in line and "--no-importance" in line
    )


def test_weights_that_are_not_finite_are_refused(digits_folder, tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=10)
    torch.nn.init.constant_(model.blocks[3].mlp.fc1.weight, float("nan"))
    path = tmp_path / "nan.pth"
    torch.save(model.state_dict(), path)
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), *SMALL]
    line = refused(capsys, tmp_path, *argv, "--checkpoint", str(path))
    assert "blocks.3" in line and "not finite" in line


def test_a_missing_or_unsplit_folder_is_refused(tmp_path, capsys):
    argv = ["--model", "test_vit", "--data-dir"]
    assert "does not exist" in refused(capsys, tmp_path, *argv, str(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    assert "Found 0 images" in refused(capsys, tmp_path, *argv, str(tmp_path / "empty"))
    write_digits(tmp_path / "half", range(10), val=0)
    assert "no validation/ folder" in refused(capsys, tmp_path, *argv, str(tmp_path / "half"))


def test_a_device_that_is_not_there_and_missing_matplotlib_are_refused(
    digits_folder, tmp_path, capsys, monkeypatch
):
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder)]
    assert "--device abacus" in refused(capsys, tmp_path, *argv, "--device", "abacus")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in refused(capsys, tmp_path, *argv)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "0"], ["--batch-size 0 must be a whole number of at least 1"]),
        (["--img-size", "-1"], ["--img-size -1 must be a whole number of at least 1"]),
        (["--seed", "-1"], ["--seed -1 must be a whole number between 0 and"]),
        (["--num-classes", "ten"], ["--num-classes ten must be a whole number"]),
        (["--pool", "least"], ["--pool", "'least'", "first"]),
        (
            ["--pretrained", "--checkpoint", "x.pth"],
            ["--pretrained", "--checkpoint", "not allowed"],
        ),
        (["--checkpoint", *"abcdefg"], ["--checkpoint", "7 files"]),
        (["--label", "one", "two"], ["--label", "2 names"]),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    options, words, digits_folder, tmp_path, capsys
):
    argv = ["--model", "test_vit", "--data-dir", str(digits_folder), *options]
    line = refused(capsys, tmp_path, *argv)
    assert all(word in line for word in words)


def test_a_multilabel_checkpoint_is_measured_by_its_own_loss_and_targets(
    labels, digits_folder, tmp_path, capsys
):
    from runs import VIT, run
    from sklearn.metrics import average_precision_score

    folder = run(digits_folder, tmp_path, *VIT, "--drop-path", 0.1, *labels, "--epochs", 1)
    checkpoint = str(folder / "last.pth.tar")
    argv = ["--model", "test_vit", "--checkpoint", checkpoint, "--device", "cpu"]
    assert features.main([*argv, "--output", str(tmp_path / "out")]) == 0

    source = models.read_source(checkpoint, "test_vit", False, "")
    images, classes = models.choose_images(
        None, 256, 0, source.settings["dataset"], source.settings
    )
    args = argparse.Namespace(model="test_vit", pretrained=False, num_classes=None, img_size=None)
    args.in_chans = None
    model, data, _ = models.build(args, source, classes)
    images.dataset.transform = timm.data.create_transform(**data)
    x, y = next(iter(DataLoader(images, 256)))
    assert classes == 4 and y.shape == (40, 4)
    with torch.no_grad():
        logits = model(x)
        loss = F.binary_cross_entropy_with_logits(logits, y.float()).item()
        for parameter in model.blocks[1].attn.proj.parameters():
            parameter.zero_()
        without = F.binary_cross_entropy_with_logits(model(x), y.float()).item()
    precision = average_precision_score(y.numpy(), logits.numpy(), average="macro")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert f"loss {loss:.4f}, mean average precision {precision:.2%}" in summary
    rows = {r["path"]: r for r in read_csv(tmp_path / "out" / "importance.csv")}
    row = rows["blocks.1.drop_path1"]
    assert "map" in row and float(row["loss"]) == pytest.approx(without, abs=1e-4)

    # Class folders do not hold such labels: one line, or the features alone.
    argv += ["--data-dir", str(digits_folder)]
    line = refused(capsys, tmp_path, *argv)
    assert "multilabel with 4 classes" in line and "--no-importance" in line
    assert features.main([*argv, "--no-importance", "--output", str(tmp_path / "alone")]) == 0
