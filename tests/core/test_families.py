"""D(S) of every timm family, held against the gradients of a real backward.

For random sets S of paths, and for all of them, exactly these paths are multiplied by zero in a
real forward in double precision. The parameters whose gradients are then numerically zero must be
D(S).
"""

import importlib
import inspect
import random

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import nn

from timm_rdp.core.trace import trace_paths

XCEPTION_BLOCKS = [
    {"in_chs": 64, "out_chs": 48, "stride": 2},
    {"in_chs": 48, "out_chs": 48, "stride": 1},
    {"in_chs": 48, "out_chs": 48, "stride": 1},
    {"in_chs": 48, "out_chs": (48, 64, 64), "stride": 2},
    {"in_chs": 64, "out_chs": (64, 64, 96), "no_skip": True, "stride": 1},
]

# Module of timm.models -> (model, image size, options that make it small).
FAMILIES = {
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 48, "depth": 3}),
    "byoanet": ("eca_botnext26ts_256", 64, {"img_size": 64}),
    "byobnet": ("test_byobnet", 64, {}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "depth": 3}),
    "coat": ("coat_tiny", 64, {"img_size": 64, "embed_dims": [32] * 4}),
    "convit": ("convit_tiny", 32, {"img_size": 32, "depth": 6, "local_up_to_layer": 2}),
    "convnext": ("test_convnext", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 64, {"embed_dim": [48, 96], "depth": [[1, 2, 0], [1, 2, 0]]}),
    "csatv2": ("csatv2", 64, {"dims": (16, 24, 48, 64), "depths": (2, 2, 2, 2)}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 2, 1), "embed_dims": (24, 48, 96, 192)}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"embed_dim": 64, "depth": 3, "num_heads": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 3}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": (
        "efficientformer_l1",
        224,
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 48)},
    ),
    "efficientformer_v2": (
        "efficientformerv2_s0",
        64,
        {"img_size": 64},
    ),
    "efficientnet": ("efficientnet_lite0", 32, {}),
    "efficientvim": ("efficientvim_m1", 64, {"embed_dim": (32, 48, 64)}),
    "eva": ("eva02_tiny_patch14_224", 28, {"img_size": 28, "embed_dim": 48, "depth": 3}),
    "fasternet": ("fasternet_t0", 64, {"depths": (1, 1, 2, 1)}),
    "fastvit": ("fastvit_t8", 64, {"embed_dims": (24, 48, 96, 192), "layers": (1, 1, 2, 1)}),
    "focalnet": ("FocalNet", 64, {"embed_dim": 16, "depths": (1, 1, 2, 1)}),
    "gcvit": ("GlobalContextVit", 64, {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2, 1)}),
    "gemma4_vit": ("gemma4_vit_167m", 96, {"embed_dim": 64, "depth": 3, "num_heads": 2}),
    "hardcorenas": ("hardcorenas_a", 32, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64, "embed_dim": 16, "stages": (1, 2, 2, 1)}),
    "hieradet_sam2": (
        "hieradet_small",
        64,
        {"embed_dim": 16, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)},
    ),
    "iformer": ("iformer_t", 64, {"dims": (16, 32, 48, 64), "depths": (1, 1, 9, 6)}),
    "inception_next": ("inception_next_atto", 64, {"dims": (16, 24, 32, 48)}),
    "levit": ("levit_128s", 64, {"img_size": 64, "embed_dim": (32, 48, 64)}),
    "lowformer": ("lowformer_b0", 64, {"width_list": [8, 16, 32, 64, 128]}),
    "mambaout": ("test_mambaout", 64, {}),
    "maxxvit": ("test_maxvit", 64, {"img_size": 64}),
    "metaformer": ("MetaFormer", 96, {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1)}),
    "mlp_mixer": ("gmixer_12_224", 32, {"img_size": 32}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": (
        "MultiScaleVit",
        64,
        {"img_size": (64, 64), "cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=16)},
    ),
    "naflexvit": ("naflexvit_base_patch16_gap", 32, {"embed_dim": 48, "depth": 3, "num_heads": 3}),
    "nest": (
        "Nest",
        64,
        {"img_size": 64, "embed_dims": (24, 48, 96), "num_heads": (1, 2, 4), "depths": (1, 1, 2)},
    ),
    "nextvit": ("nextvit_small", 32, {"stem_chs": (16, 16, 16), "depths": (1, 1, 5, 2)}),
    "nfnet": ("test_nfnet", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": [1, 2, 3]}),
    "pvt_v2": ("pvt_v2_b0", 64, {"depths": (1, 1, 2, 1)}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"embed_dim": 48, "depth": 3, "num_heads": 3}),
    "rdnet": (
        "rdnet_tiny",
        64,
        {"num_init_features": 16, "growth_rates": [8] * 7, "num_blocks_list": [2] * 7},
    ),
    "regnet": ("regnetx_002", 64, {}),
    "res2net": ("res2next50", 64, {"layers": [1, 1, 2, 1]}),
    "resnet": ("test_resnet", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {"channels": (16, 24, 32, 48)}),
    "rexnet": ("rexnet_100", 64, {"width_mult": 0.5}),
    "sequencer": (
        "sequencer2d_s",
        56,
        {"img_size": 56, "layers": [1, 1, 2, 1], "embed_dims": [48] * 4, "hidden_sizes": [12] * 4},
    ),
    "sknet": ("skresnet18", 64, {"channels": (32, 32, 48, 64)}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {"layers": [1, 1, 2, 2]}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        32,
        {"img_size": 32, "embed_dim": 24, "depths": (1, 2, 2)},
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        32,
        {"img_size": 32, "embed_dim": 24, "depths": (1, 2, 2)},
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_ns_224",
        32,
        {"img_size": 32, "embed_dim": 24, "depths": (1, 2, 2)},
    ),
    "tiny_vit": (
        "tiny_vit_5m_224",
        64,
        {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4]},
    ),
    "tnt": ("tnt_s_patch16_224", 32, {"img_size": 32, "embed_dim": 48, "depth": 3}),
    "tresnet": ("tresnet_m", 64, {"layers": [1, 1, 2, 1], "width_factor": 0.5}),
    "twins": ("twins_svt_small", 64, {"img_size": 64, "depths": [1, 2, 2, 1]}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "embed_dim": 48, "depth": (1, 2, 1)}),
    "vision_transformer": ("test_vit", 32, {"img_size": 32}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64, "depth": 3}),
    "vision_transformer_relpos": ("test_vit_relpos", 32, {"img_size": 32}),
    "vision_transformer_sam": (
        "samvit_base_patch16_224",
        64,
        {"img_size": 64, "embed_dim": 48, "depth": 4},
    ),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64, "depth": 3}),
    "volo": (
        "VOLO",
        64,
        {
            "img_size": 64,
            "layers": (1, 1, 2, 1),
            "embed_dims": (24, 48, 48, 48),
            "num_heads": (1, 2, 2, 2),
            "use_aux_head": False,
        },
    ),
    "vovnet": ("ese_vovnet39b", 32, {}),
    "xception_aligned": ("xception41p", 64, {"block_cfg": XCEPTION_BLOCKS}),
    "xcit": ("xcit_nano_12_p16_224", 32, {"img_size": 32, "depth": 3}),
}
# Those that the default run checks; the others are in the sweep.
FIRST = {"beit", "byobnet", "cait", "convit", "convnext", "cspnet", "deit", "efficientnet", "eva"}
FIRST |= {"focalnet", "hiera", "maxxvit", "mobilenetv3", "nfnet", "pit", "pvt_v2", "regnet"}
FIRST |= {"resnet", "swin_transformer", "vision_transformer", "volo", "xcit"}
# Where the head reads the class token alone, and every path by which that sees the other tokens is
# dropped, these have no gradient although the graph leads there (a slice of one tensor). D(S) is
# then less than the zero gradients. So many paths fall together only from this rate on.
SEEN_BY_THE_CLASS_TOKEN = {
    "coat": {"equal_below": 1.0},
    "convit": {"equal_below": 0.8},
    "pit": {"equal_below": 0.8},
    "tnt": {"equal_below": 0.8},
}
# Kinds of block that the table above does not touch.
TINY_VIT = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 3}
KINDS = {
    "branches side by side": ("vit_small_patch16_18x2_224", 32, TINY_VIT),
    "attention and mlp side by side": ("vit_base_patch16_xp_224", 32, TINY_VIT),
    "norm after the branch": ("vit_relpos_small_patch16_rpn_224", 32, TINY_VIT),
    "transposed tokens": ("resmlp_12_224", 32, {"img_size": 32}),
    "spatial gating": ("gmlp_ti16_224", 32, {"img_size": 32}),
    "convolution and attention": ("test_coatnet", 64, {"img_size": 64}),
    "pre-activation": ("test_nfnet", 64, {}),
    "no class token before the last layers": ("xcit_nano_12_p16_224", 32, {"img_size": 32}),
}
# resnest is on its own, see below.
ON_THEIR_OWN = {"resnest"}


def create(name, options):
    """The model in double precision and train mode, every parameter off its special values."""
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.2, "num_classes": 5, **options}
    if name[0].isupper():  # a class, where the functions of timm do not let the size be chosen
        model = getattr(timm.models, name)(**options)
    else:
        model = timm.create_model(name, **options)
    model.double().train()
    for parameter in model.parameters():  # zero-initialised layers would hide live ones
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


class PathsTimesZero:
    """Real backwards of a model with chosen calls of its DropPaths multiplied by zero."""

    def __init__(self, model, images):
        self.model, self.images = model, images
        self.names = {m: n for n, m in model.named_modules() if isinstance(m, DropPath)}
        self.zeroed = set()
        self.calls = []
        for module in self.names:
            module.drop_prob = 0.0
            module.register_forward_hook(self._multiply)

    def _multiply(self, module, _, output):
        call = (self.names[module], sum(name == self.names[module] for name, _ in self.calls))
        self.calls.append(call)
        return output * 0.0 if call in self.zeroed else output

    def gradients(self, zeroed):
        """Largest gradient of each parameter, and of the input."""
        self.zeroed, self.calls = set(zeroed), []
        self.model.zero_grad()
        images = self.images.clone().requires_grad_()
        torch.manual_seed(1)
        output = first_tensor(self.model(images))
        weights = torch.randn(output.shape, dtype=output.dtype)
        (output * weights).sum().backward()
        largest = lambda t: 0.0 if t.grad is None else t.grad.abs().max().item()
        return {n: largest(p) for n, p in self.model.named_parameters()}, largest(images)


def check_dropped_parts(name, size, options, equal_below=2.0):
    model = create(name, options)
    images = torch.randn(3, 3, size, size, dtype=torch.double)
    graph = trace_paths(model, images)
    real = PathsTimesZero(model, images)
    live, _ = real.gradients(())
    # The paths are the calls of the real forward, in its order: no path is a DropPath never called.
    assert [(real.names[p.module], p.call) for p in graph.paths] == real.calls
    call_of = dict(zip((p.name for p in graph.paths), real.calls, strict=True))
    # Parameters without a gradient even with nothing dropped (a bias before a norm) say nothing.
    noise = 1e-11 * max(live.values())
    alive = {n for n, largest in live.items() if largest > noise}
    assert len(alive) > len(live) / 2

    rng = random.Random(1)
    residual = [p.name for p in graph.paths if p.residual]
    for rate in (0.5, 0.8, 1.0):
        dropped = [n for n in residual if rng.random() < rate]
        largest, _ = real.gradients(call_of[n] for n in dropped)
        zero = {n for n, largest in largest.items() if largest <= 1e-30}
        dropped_part = graph.dropped_part(dropped) & alive
        assert dropped_part <= zero, dropped
        if rate < equal_below:
            assert dropped_part == zero & alive, dropped

    for path in graph.paths:
        if not path.residual:
            assert real.gradients([call_of[path.name]])[1] <= 1e-30, path
    for path in rng.sample(residual, min(2, len(residual))):
        assert real.gradients([call_of[path]])[1] > 0, path
    return graph


@pytest.mark.parametrize(
    "family",
    [
        family if family in FIRST else pytest.param(family, marks=pytest.mark.sweep)
        for family in sorted(FAMILIES)
    ],
)
def test_dropped_parts_are_the_zero_gradients_of_a_real_backward(family):
    check_dropped_parts(*FAMILIES[family], **SEEN_BY_THE_CLASS_TOKEN.get(family, {}))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_dropped_parts_of_other_kinds_of_blocks_are_the_zero_gradients_too(kind):
    check_dropped_parts(*KINDS[kind])


def test_where_timm_drops_the_shortcut_nothing_is_carried():
    # timm's resnest passes the input of its shortcut through the DropPath. What comes before still
    # reaches the output by the branch, and what comes after (convolution and norm of the shortcut)
    # does so by itself: its gradients vanish only because it is given zeros.
    name, size = "resnest14d", 64
    model = create(name, {})
    images = torch.randn(3, 3, size, size, dtype=torch.double)
    graph = trace_paths(model, images)
    real = PathsTimesZero(model, images)
    live, _ = real.gradients(())
    for path, call in zip(graph.paths, list(real.calls), strict=True):
        assert path.residual
        assert path.parameters == ()
        gradients, of_input = real.gradients([call])
        zero = {n for n in live if gradients[n] == 0 and live[n] > 1e-11}
        shortcut = path.name.removesuffix("drop_path") + "downsample"
        assert zero == {f"{shortcut}.1.weight", f"{shortcut}.2.weight"}
        assert of_input > 0


def test_every_timm_family_that_knows_drop_path_is_in_the_table():
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    knowing = {
        module.removeprefix("timm.models.")
        for module in modules
        if "drop_path" in inspect.getsource(importlib.import_module(module))
    }
    assert len(knowing) > 70
    assert knowing - ON_THEIR_OWN <= FAMILIES.keys()
    for family, (name, _, _) in FAMILIES.items():
        home = getattr(timm.models, name, None) or timm.model_entrypoint(name)
        assert home.__module__ == f"timm.models.{family}"
