#!/usr/bin/env bash
# Where to look for a setting in which RDP helps: docs/results_digits.md. Seeds other than the tables'.
set -eu
python benchmarks/low_data_digits.py --per-class 30 --output output/digits300
python benchmarks/low_data_digits.py --per-class 10 --output output/digits100
resnet="--model resnet18 --img-size 16"
shape="--model-kwargs channels=[16,24,32,48]"
few="-c configs/demo_digits.yaml --warmup-epochs 5 --batch-size 32 --data-dir output/digits300"
grid="--variants droppath droppath-matched rdp --seeds 3 --first-seed 0 --jobs 2
    --val-interval 1000 --checkpoint-hist 1 --epochs 50"
explore() {
    timm-rdp compare $few $grid "${@:2}" --output "output/explore/$1"
}

explore usual $resnet $shape layers=[3,3,3,3] --lr 2e-3 --drop-paths 0.1
explore high_rate $resnet $shape layers=[3,3,3,3] --lr 2e-3 --drop-paths 0.5
explore every_4 $resnet $shape layers=[3,3,3,3] --lr 2e-3 --drop-paths 0.3 --rdp-every 4
explore late_start $resnet $shape layers=[3,3,3,3] --lr 2e-3 --drop-paths 0.3 --rdp-start-epoch 25
explore low_lr $resnet $shape layers=[3,3,3,3] --lr 5e-4 --drop-paths 0.3
explore deep $resnet $shape layers=[6,6,6,6] --lr 2e-3 --drop-paths 0.3
explore plain_residual $resnet $shape layers=[3,3,3,3] zero_init_last=False --lr 2e-3 --drop-paths 0.3

hundred="--data-dir output/digits100 --batch-size 16 --epochs 80"
vit="--model test_vit --img-size 8 --lr 1e-3 --epochs 100 --drop-paths 0.3"
shape="--model-kwargs embed_dim=64 depth=6 num_heads=2 patch_size=2"
explore fewer_images $resnet --model-kwargs channels=[16,24,32,48] layers=[3,3,3,3] $hundred --lr 2e-3 --drop-paths 0.3
explore vit_usual $vit $shape
explore vit_layer_scale $vit $shape init_values=0.1
explore vit_deep $vit --model-kwargs embed_dim=48 depth=12 num_heads=2 patch_size=2
