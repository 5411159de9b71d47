#!/usr/bin/env bash
# The experiments of registered.md. Interrupted, the same command goes on where it was.
# SOURCE: folder of Fashion-MNIST's four files (default: where Debian's package puts them).
set -eu
export OMP_NUM_THREADS=1
data=output/fashion_mnist out=output/registered
source=${SOURCE:-/usr/share/datasets/fashion-mnist}
few=$data/few/final all=$data/all/final
[ -d $few ] || python benchmarks/fashion_mnist.py --source "$source" --output $data/few --per-class 500
[ -d $all ] || python benchmarks/fashion_mnist.py --source "$source" --output $data/all

train="--dataset torch/fashion_mnist --in-chans 1 --num-classes 10 --img-size 28 --no-aug --smoothing 0
    --batch-size 128 --workers 0 --opt adamw --weight-decay 0.05 --warmup-epochs 0 --val-interval 1000
    --checkpoint-hist 1 --device cpu"
vit="--model test_vit --model-kwargs img_size=28 embed_dim=48 depth=12 num_heads=3 patch_size=7"
resnet="--model resnet18 --model-kwargs channels=[16,24,32,48] layers=[3,3,3,3]"
seeds="--seeds 8 --first-seed 300 --jobs 2"

timm-rdp compare $train $vit --data-dir $few --lr 1e-3 --epochs 30 $seeds --measure 2000 \
    --drop-paths 0.3 0.6 --output $out/e1 \
    --variants plain droppath droppath-matched rdp rdp-random rdp-unfrozen

timm-rdp compare $train $vit --data-dir $few --lr 1e-3 --epochs 10 $seeds \
    --drop-paths 0.3 0.6 0.8 --output $out/e2 --variants droppath rdp

for seed in 300 304; do
    python benchmarks/nested_depth.py --data-dir $few --output $out/e3/$seed --epochs 15 \
        --first-seed $seed --seeds 4 &
done
wait

timm-rdp train $train $vit --data-dir $few --lr 1e-3 --epochs 30 --seed 399 \
    --output $out --experiment e4_start --resume auto
timm-rdp compare $train $vit --data-dir $few --lr 1e-4 --epochs 3 $seeds --measure 2000 \
    --initial-checkpoint $out/e4_start/last.pth.tar --drop-paths 0.3 --output $out/e4 \
    --variants plain droppath droppath-matched rdp rdp-random

# --channels-last came after the plan, and before any result of E5: the same network in less time.
timm-rdp compare $train $resnet --channels-last --data-dir $all --lr 2e-3 --epochs 15 $seeds \
    --measure 2000 --drop-paths 0.3 --output $out/e5 --variants droppath droppath-matched rdp
