#!/usr/bin/env bash
# Where to look for a setting in which RDP helps: docs/results.md. Seeds other than the tables'.
set -eu
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
