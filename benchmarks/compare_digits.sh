#!/usr/bin/env bash
# The comparisons of docs/results_digits.md. Interrupted, it goes on where it was.
set -eu
python benchmarks/low_data_digits.py --per-class 30 --output output/digits300

vit="--model test_vit --img-size 8 --model-kwargs embed_dim=64 depth=6 num_heads=2 patch_size=2"
resnet="--model resnet18 --img-size 16 --model-kwargs channels=[16,24,32,48] layers=[3,3,3,3]"
all="-c configs/demo_digits.yaml --warmup-epochs 2 --batch-size 64"
few="-c configs/demo_digits.yaml --warmup-epochs 5 --batch-size 32 --data-dir output/digits300"
grid="--drop-paths 0.1 0.3 --seeds 5 --first-seed 100 --jobs 2 --val-interval 1000
    --checkpoint-hist 1 --variants plain droppath droppath-matched rdp rdp-next"

timm-rdp compare $few $grid droppath-batch $resnet --lr 2e-3 --epochs 50 --output output/compare/resnet_300
timm-rdp compare $few $grid droppath-batch $vit --lr 1e-3 --epochs 80 --output output/compare/vit_300
timm-rdp compare $all $grid $resnet --lr 2e-3 --epochs 12 --output output/compare/resnet_all
timm-rdp compare $all $grid $vit --lr 1e-3 --batch-size 32 --epochs 40 --output output/compare/vit_all \
    --variants plain droppath droppath-matched rdp
timm-rdp compare $few $grid $vit --lr 1e-3 --epochs 120 --output output/compare/vit_300_long \
    --variants plain droppath droppath-matched rdp

# What explore_digits.sh suggested, on seeds of its own.
timm-rdp compare $few $grid $resnet zero_init_last=False --lr 2e-3 --epochs 50 --drop-paths 0.3 --first-seed 200 --seeds 10 \
    --output output/compare/resnet_300_plain_residual --variants plain droppath droppath-matched rdp
