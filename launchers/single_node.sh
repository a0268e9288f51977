#!/usr/bin/env bash
# All accelerators of this machine (or N CPU ranks): launchers/single_node.sh RECIPE [--set.field value …]
# RANKS: how many; every GPU by default, else 2 CPU ranks.
set -euo pipefail
if [[ ${1-} == --help ]]; then sed -n '2,/^set/{/^set/d;s/^# //p}' "${BASH_SOURCE[0]}"; exit; fi

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# CPU ranks share the cores; a GPU rank needs few of its own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((n = $(nproc) / ranks) > 0 ? n : 1))}
exec python -m namr_dist.launchers.torchrun --standalone --nproc-per-node "$ranks" "$here/train.py" "$@"
