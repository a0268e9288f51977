#!/usr/bin/env bash
# All that only a GPU can show, in parts of some minutes each:  tools/measure_on_gpu.sh PART OUT
#
#     first      one short training run, then the tests outside the kernels that need a GPU
#     check      tests of the kernels, compiled
#     sanitise   every op once under compute-sanitizer, where that works
#     tune       candidates for the table of tile sizes, in OUT/tune.csv; the best rows on the terminal
#     kernels    the losses beside other implementations in bfloat16, and bare products
#     float32    the same in float32
#     largest    memory, the largest batches, first calls
#     train      training end to end on a set of the size of Stanford Online Products, with traces
#     search     exact search at its size, and a smaller one beside the CPU
#     reproduce  losses with and without multi-cluster ranking for one seed, in OUT/reproduce; again: goes on
#
# It runs the namr and python3 on the PATH; CSVs grow case by case, so a part that is stopped keeps what it has.
# tools/make_performance.py makes tables of what is copied to docs/results under the names that it says.
set -euo pipefail

part=${1:?PART is missing; the head of this script lists them} out=${2:?OUT, a folder for results, is missing}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
# One machine, whatever its network.
export PYTHONUNBUFFERED=1 NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME-lo}

losses() { # LOSSES… -- OPTIONS of namr bench kernels
    local names=()
    while [[ $1 != -- ]]; do names+=("$1") && shift; done
    namr bench kernels --losses "${names[@]}" --csv "$out/kernels-h200.csv" "${@:2}"
}

compare() { # DTYPE
    local whole=(--dtype "$1" --budget 4 --passes forward+backward)
    losses multi-cluster-ranking -- --rows 4096 16384 --width 128 512 "${whole[@]}" --providers ours eager compile matmul
    losses triplet-hardest triplet-semihard multi-similarity proxy-anchor margin -- --rows 16384 --width 512 \
        "${whole[@]}" --providers ours eager compile pml matmul
    losses multi-similarity triplet-hardest -- --rows 16384 65536 --width 512 --dtype "$1" --passes forward \
        --providers ours matmul
}

tests() { # LOG SECONDS OPTIONS… of pytest: stopped, it still says what failed until then
    timeout -s INT "$2" python3 -m pytest -v -m gpu --durations 20 "${@:3}" > "$out/$1" 2>&1 || echo "pytest: code $?"
    tail -n 40 "$out/$1"
}

case $part in
first)
    namr train homeware_conv4 --run-dir "$(mktemp -d)/run" --set.optim.steps 20 --set.optim.warmup_steps 2 \
        --set.train.log_every 5 2>&1 | tee "$out/first-run.txt"
    tests alone.txt 120 tests/train/test_phases.py tests/data/read/test_stream.py
    tests training.txt 300 -n 3 --dist loadgroup tests/train/test_training_on_gpu.py tests/bench/test_bench_train.py \
        tests/retrieval/test_search_exact.py tests/retrieval/test_search_keys.py
    ;;
check)
    tests kernels.txt 540 -n 14 --dist loadgroup tests/kernels --deselect tests/kernels/test_sanitise.py
    ;;
sanitise)
    tests sanitise.txt 400 -n 2 tests/kernels/test_sanitise.py
    ;;
tune)
    timeout 560 python3 -m namr_dist.kernels.gpu.tune --dtype bfloat16 float32 --width 512 128 --csv "$out/tune.csv" |
        tee "$out/tune.txt"
    ;;
kernels)
    losses multi-cluster-ranking -- --rows 1024 --width 512 --providers ours naive --passes forward+backward
    compare bfloat16
    ;;
float32)
    compare float32
    ;;
largest)
    losses multi-cluster-ranking triplet-hardest multi-similarity proxy-anchor -- --rows 65536 --width 512 \
        --dtype float32 bfloat16 --samples 10 --budget 4 --providers ours matmul --passes forward+backward
    for loss in multi-cluster-ranking triplet-hardest multi-similarity; do
        TRITON_CACHE_DIR=$(mktemp -d) namr bench kernels --losses "$loss" --providers ours --rows 4096 --width 512 \
            --samples 1 --csv "$out/kernels-h200-cold.csv"
    done
    for width in 512 128; do
        python3 tools/largest_batch.py --width "$width" --seconds 8 --csv "$out/largest-batch-h200.csv"
    done
    ;;
train)
    df -h /dev/shm || true # from the loader's workers to training: 9 GB for the second command, 20 for the third
    shards=$(mktemp -d)
    python3 -c 'import sys; from pathlib import Path; from namr_dist.bench.large_set import make_large_set
make_large_set(Path(sys.argv[1]))' "$shards"
    namr bench train homeware --shards "$shards" --batch 512 4096 16384 --precision bf16 --steps 20 \
        --csv "$out/train-homeware.csv" --trace "$out/homeware.json.gz"
    namr bench train sop --shards "$shards" --batch 512 4096 --precision bf16 fp32 --steps 10 \
        --csv "$out/train-resnet50.csv" --trace "$out/resnet50.json.gz"
    # A worker makes whole batches, 2.5 GB each here, and holds some: few workers.
    namr bench train sop --shards "$shards" --batch 16384 --precision bf16 --steps 5 --set.train.micro_batch 512 \
        --set.data.workers 4 --csv "$out/train-resnet50-16384.csv"
    ;;
search)
    namr bench search --items 60502 --width 512 -k 32 1000 --backends torch-gpu --repeats 5 --csv "$out/search-gpu.csv"
    namr bench search --items 15125 --width 512 -k 32 --csv "$out/search-both.csv"
    ;;
reproduce)
    namr reproduce --seeds 0 --run-dir "$out/reproduce" --set.data.workers 8 --set.train.tensorboard False
    ;;
*)
    echo "no part $part; the head of this script lists them" >&2
    exit 2
    ;;
esac
