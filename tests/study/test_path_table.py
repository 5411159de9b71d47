"""`timm-rdp paths`: the table says what the model's own parameters say."""

import json

import pytest
import timm
import torch

from timm_rdp.study.paths import as_text, main


def table_of(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def elements_under(model: torch.nn.Module, *prefixes: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes))


def test_a_path_carries_the_branch_that_leads_to_it(capsys):
    table = table_of(capsys, "--model", "test_vit", "--drop-path", "0.3")
    model = timm.create_model("test_vit", drop_path_rate=0.3)
    rows = {row["name"]: row for row in table["paths"]}
    # By timm's linear rule the first of six blocks has rate 0, and so no DropPath.
    assert len(rows) == 2 * 5
    for i in range(1, 6):
        attention = rows[f"blocks.{i}.drop_path1"]
        assert attention["elements"] == elements_under(
            model, f"blocks.{i}.norm1", f"blocks.{i}.att"
        )
        mlp = rows[f"blocks.{i}.drop_path2"]
        assert mlp["elements"] == elements_under(model, f"blocks.{i}.norm2", f"blocks.{i}.mlp")
        assert attention["drop_prob"] == mlp["drop_prob"] == pytest.approx(0.3 * i / 5)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224", "mobilevit_xxs"])
def test_totals_add_up_to_the_model(capsys, name):
    table = table_of(capsys, "--model", name)
    sizes = {n: p.numel() for n, p in timm.create_model(name).named_parameters()}
    together, rest = table["all_paths"], table["not_on_any_path"]
    assert table["elements"] == sum(sizes.values()) == together["elements"] + rest["elements"]
    assert table["tensors"] == len(sizes) == together["tensors"] + rest["tensors"]
    assert together["share"] + rest["share"] == pytest.approx(1)
    assert set(together["parameters"]) | set(rest["parameters"]) == set(sizes)
    for row in [*table["paths"], together, rest]:
        assert row["elements"] == sum(sizes[n] for n in row["parameters"])
        assert row["tensors"] == len(row["parameters"])
    for row in table["paths"]:
        assert set(row["parameters"]) <= set(together["parameters"])


def test_modules_not_on_any_path_hold_just_the_parameters_not_on_any_path(capsys):
    table = table_of(capsys, "--model", "test_resnet")
    model = timm.create_model("test_resnet")
    named = table["modules_not_on_any_path"]
    inside = {
        n
        for n, _ in model.named_parameters()
        if n in named or n.startswith(tuple(f"{m}." for m in named))
    }
    assert inside == set(table["not_on_any_path"]["parameters"])


def test_a_module_called_twice_makes_two_rows(capsys):
    names = [row["name"] for row in table_of(capsys, "--model", "cait_xxs24_224")["paths"]]
    assert "blocks.0.drop_path#0" in names and "blocks.0.drop_path#1" in names


def test_calls_not_around_a_residual_are_marked(capsys):
    table = table_of(capsys, "--model", "mobilevit_xxs")
    marked = [row["name"] for row in table["non_residual"]]
    # mobilevit's down-sampling stage blocks have a DropPath, and no shortcut around it.
    assert "stages.2.0.drop_path" in marked
    assert not set(marked) & {row["name"] for row in table["paths"]}
    main(["--model", "mobilevit_xxs"])
    text = capsys.readouterr().out
    assert f"Not around a residual: {len(marked)} DropPath calls" in text
    assert all(f"{name} (" in text for name in marked)


def test_the_printed_table_has_a_row_for_each_path_and_the_totals(capsys):
    table = table_of(capsys, "--model", "test_vit", "--drop-path", "0.3")
    assert main(["--model", "test_vit", "--drop-path", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in table["paths"]:
        line = next(text for text in lines if text.startswith(f"{row['name']} "))
        assert line.split() == [
            row["name"],
            f"{row['drop_prob']:.4f}",
            *(["computed"] if row["run_when_dropped"] else ["not", "run"]),
            f"{row['elements']:,}",
            str(row["tensors"]),
            f"{row['share']:.2%}",
        ]
    assert any(
        text.startswith("all paths together ") and f"{table['all_paths']['elements']:,}" in text
        for text in lines
    )
    assert max(map(len, lines)) <= 120


def test_paths_that_are_computed_though_dropped_are_told_apart(capsys):
    # coat's parallel blocks share weights between scales, so some of their paths carry nothing.
    table = table_of(capsys, "--model", "coat_tiny")
    computed = [row["name"] for row in table["paths"] if row["run_when_dropped"]]
    assert 0 < len(computed) < len(table["paths"])
    text = as_text(table)
    assert [line.split()[0] for line in text.splitlines() if "  computed  " in line] == computed
    not_run = len(table["paths"]) - len(computed)
    assert f"When dropped, {not_run} of {len(table['paths'])} paths are not run" in text
    vit = table_of(capsys, "--model", "test_vit")["paths"]
    assert not any(row["run_when_dropped"] for row in vit)


def test_an_image_size_changes_only_what_depends_on_it(capsys):
    small = table_of(capsys, "--model", "vit_tiny_patch16_224", "--img-size", "64")
    own = table_of(capsys, "--model", "vit_tiny_patch16_224")
    assert small["paths"] == [
        {**row, "share": row["elements"] / small["elements"]} for row in own["paths"]
    ]
    assert small["elements"] < own["elements"]  # fewer position embeddings
    assert (
        table_of(capsys, "--model", "test_resnet", "--img-size", "96")["paths"]
        == (table_of(capsys, "--model", "test_resnet")["paths"])
    )


def test_model_arguments_are_those_of_the_model(capsys):
    name = "vit_tiny_patch16_224"
    kwargs = ("--img-size", "64", "--model-kwargs", "depth=3", "in_chans=1")
    table = table_of(capsys, "--model", name, *kwargs)
    model = timm.create_model(name, img_size=64, depth=3, in_chans=1, drop_path_rate=0.1)
    assert table["elements"] == sum(p.numel() for p in model.parameters())
    assert len(table["paths"]) == 2 * 2


def test_no_random_state_moves(capsys):
    before = torch.get_rng_state()
    main(["--model", "test_vit"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model", "vit_smal_patch16_224"], "did you mean vit_small_patch16_224"),
        (["--model", "no_model_like_this"], "timm.list_models()"),
        (["--model", "vgg11"], "takes no drop_path_rate"),
        (["--model", "densenet121"], "takes no drop_path_rate"),
        (["--model", "lcnet_050"], "no residual path"),
        (["--model", "test_vit", "--drop-path", "0"], "--drop-path 0 must be a number above 0"),
        (["--model", "test_vit", "--drop-path", "1"], "--drop-path 1 must be a number above 0"),
        (
            ["--model", "test_vit", "--drop-path", "-0.1"],
            "--drop-path -0.1 must be a number above 0",
        ),
        (["--model", "test_vit", "--drop-path", "nan"], "--drop-path nan must be a number above 0"),
        (
            ["--model", "test_vit", "--img-size", "0"],
            "--img-size 0 must be a whole number of at least 1",
        ),
        (["--model", "test_vit", "--img-size", "15"], "--model test_vit --img-size 15"),
        (["--model", "test_vit", "--model-kwargs", "depth"], "--model-kwargs takes key=value"),
        (["--model", "test_vit", "--model-kwargs", "drop_path_rate=0.2"], "give --drop-path"),
        (["--model", "test_vit.no_such_weights"], "no_such_weights"),
        (["--model", "local-dir:/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, expected):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ") and expected in captured.err
