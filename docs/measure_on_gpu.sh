#!/usr/bin/env bash
# Everything that only a GPU can show, in parts that take some minutes each:  docs/measure_on_gpu.sh PART OUT
#
#     check      tests that need a GPU, the kernels compiled; the smallest case under compute-sanitizer
#     tune       every candidate for the table of tile sizes, in OUT/tune.csv; the best rows on the terminal
#     kernels    the losses beside other implementations, cold starts, largest batches
#     train      training end to end on a set of the size of Stanford Online Products, with traces
#     search     exact search at its size, and a smaller one beside the CPU
#     reproduce  losses with and without multi-cluster ranking, in OUT/reproduce; again: goes on
#
# It runs the namr and python3 on the PATH. `python docs/make_performance.py` makes tables from what is copied to
# docs/results under the names it says.
set -euo pipefail

part=${1:?PART is missing; the head of this script lists them} out=${2:?OUT, a folder for results, is missing}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)

losses() { # LOSSES… -- OPTIONS of namr bench kernels
    local names=()
    while [[ $1 != -- ]]; do names+=("$1") && shift; done
    namr bench kernels --losses "${names[@]}" --csv "$out/kernels-h200.csv" "${@:2}"
}

case $part in
check)
    python3 -m pytest -m gpu -n 12 --dist loadgroup --durations 30 tests/kernels | tee "$out/check-kernels.txt"
    python3 -m pytest -m gpu -n 4 --dist loadgroup tests --ignore tests/kernels | tee "$out/check-rest.txt"
    ;;
tune)
    python3 -m namr_dist.kernels.tune --dtype bfloat16 float32 --csv "$out/tune.csv" | tee "$out/tune.txt"
    ;;
kernels)
    both=(--dtype float32 bfloat16)
    losses multi-cluster-ranking -- --rows 4096 16384 --width 128 512 "${both[@]}" --budget 4 \
        --providers ours eager compile matmul --passes forward+backward
    losses triplet-hardest triplet-semihard margin multi-similarity proxy-anchor -- --rows 16384 --width 512 \
        "${both[@]}" --budget 4 --providers ours eager compile pml matmul --passes forward+backward
    losses multi-similarity triplet-hardest -- --rows 16384 65536 --width 512 "${both[@]}" --providers ours matmul \
        --passes forward
    losses multi-cluster-ranking triplet-hardest multi-similarity proxy-anchor -- --rows 65536 --width 512 "${both[@]}" \
        --samples 10 --budget 4 --providers ours matmul --passes forward+backward
    losses multi-cluster-ranking -- --rows 1024 --width 512 --providers ours naive --passes forward+backward
    for loss in multi-cluster-ranking triplet-hardest multi-similarity; do
        TRITON_CACHE_DIR=$(mktemp -d) namr bench kernels --losses "$loss" --providers ours --rows 4096 --width 512 \
            --samples 1 --csv "$out/kernels-h200-cold.csv"
    done
    for width in 512 128; do
        python3 docs/largest_batch.py --width "$width" --seconds 30 --csv "$out/largest-batch-h200.csv"
    done
    ;;
train)
    df -h /dev/shm # the way of batches from the loader's workers
    shards=$(mktemp -d)
    python3 -c 'import sys; from pathlib import Path; from namr_dist.data.bench.large_set import make_large_set
make_large_set(Path(sys.argv[1]))' "$shards"
    namr bench train homeware --shards "$shards" --batch 512 4096 16384 --precision bf16 fp32 --steps 20 \
        --csv "$out/train-homeware.csv" --trace "$out/homeware.json.gz"
    namr bench train sop --shards "$shards" --batch 512 4096 --precision bf16 fp32 --steps 10 \
        --csv "$out/train-resnet50.csv" --trace "$out/resnet50.json.gz"
    # A worker makes whole batches, of 2.5 GB here: few of them.
    namr bench train sop --shards "$shards" --batch 16384 --precision bf16 --steps 5 --set.train.micro_batch 512 \
        --set.data.workers 8 --csv "$out/train-resnet50-16384.csv"
    ;;
search)
    namr bench search --items 60502 --width 512 -k 32 1000 --backends torch-gpu --repeats 5 --csv "$out/search-gpu.csv"
    namr bench search --items 15125 --width 512 -k 32 --csv "$out/search-both.csv"
    ;;
reproduce)
    namr reproduce --run-dir "$out/reproduce" --set.data.workers 8 --set.train.tensorboard False
    ;;
*)
    echo "no part $part; the head of this script lists them" >&2
    exit 2
    ;;
esac
