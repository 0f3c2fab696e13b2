#!/usr/bin/env bash
# Every timing and accuracy check that wants a GPU, in one call of under 8 minutes, from the repository's root:
#     bash benchmarks/gpu.sh [FOLDER FOR THE JSON FILES]
# Each part goes on where another failed; the exit status says whether one did. `make figures` draws the results.
set -uo pipefail
folder=${1:-benchmarks/results}
python=${PYTHON:-python}
failed=0

measure() { # seconds allowed, name, options
    local limit=$1 name=$2
    shift 2
    echo "== $name $*"
    timeout "$limit" "$python" -m benchmarks.run "$name" --device cuda \
        --output "$folder/$name-gpu-$(date -u +%Y-%m-%dT%H%M).json" "$@" || failed=1
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
measure 120 backends --seconds 1 --dtypes bfloat16 float16 float32
measure 120 op --lengths 8192 32768 131072 --dtypes bfloat16 --seconds 3 --dense-limit 2
measure 120 length --dtype bfloat16 --rounds 1 --limit 5 --lengths $((1<<11)) $((1<<13)) $((1<<15)) $((1<<17)) \
    $((1<<19)) $((1<<20)) $((1<<21)) $((1<<22))
measure 100 train --lengths 2048 8192 32768 131072 --seconds 3
exit $failed
