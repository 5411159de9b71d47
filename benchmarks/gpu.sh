#!/usr/bin/env bash
# Everything that needs a GPU, into one folder:
#
#     bash benchmarks/gpu.sh OUTPUT [TIMM_SCRIPT]
#
# The tests marked gpu, what updates cost in eager mode and compiled, and with timm's train.py as
# TIMM_SCRIPT our training loop beside timm's. DEVICE=cpu QUICK=1 tries the same on the CPU.
set -eu
output=$1 timm_script=${2:-}
device=${DEVICE:-cuda}
quick=${QUICK:+--quick}
cd "$(dirname "$0")/.."
mkdir -p "$output"
nvidia-smi > "$output/nvidia-smi.txt" || [ "$device" = cpu ]

status=0
pytest -m gpu --device "$device" -n 1 --durations 10 | tee "$output/tests.txt" || status=1
[ "${PIPESTATUS[0]}" = 0 ] || status=1

speed="python benchmarks/speed.py --device $device --bf16 $quick"
$speed --output "$output/eager" --batch-size 128 --rounds 10 --batch-sizes 16 256
$speed --output "$output/memory" --batch-size 128 --rounds 3 --batch-sizes --memory --rows 0 2 3
[ "$quick" ] || python benchmarks/cold_start.py --device "$device" --output "$output/cold_start"
$speed --output "$output/compiled" --batch-size 128 --rounds 10 --batch-sizes --compile
if [ "$timm_script" ]; then
    python benchmarks/loop.py --device "$device" $quick --timm-script "$timm_script" \
        --output "$output/loop"
fi
exit $status
