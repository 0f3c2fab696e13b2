#!/usr/bin/env bash
# Every check, timing and accuracy that wants a GPU, in one call of under 8 minutes, from the repository's root:
#     bash benchmarks/gpu.sh [FOLDER FOR THE JSON FILES]
# Each part goes on where another failed; the exit status says whether one did. `make figures` draws the results.
set -uo pipefail
folder=${1:-benchmarks/results}
python=${PYTHON:-python}
machine=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
paper='2048/1 4096/2 8192/4 16384/6 32768/12'
model=configuration/longnet-125m.json
failed=0

measure() { # seconds allowed, file, name, options
    local limit=$1 file=$2
    shift 2
    echo "== $*"
    timeout "$limit" "$python" -m benchmarks.run "$@" --device cuda \
        --output "$folder/$file-$machine-$(date -u +%Y-%m-%dT%H%M).json" || failed=1
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
measure 65 op op --lengths 32768 131072 --dtypes bfloat16 --seconds 0.4 --dense-limit 2
measure 25 op-wide op --heads 16 --head-dim 128 --lengths 32768 --dtypes bfloat16 --seconds 0.4 --patterns "$paper"
# The tests compile many small kernels on the processor, and memory is counted, not timed: side by side.
timeout 80 "$python" -m pytest -q -n 8 -p no:cacheprovider tests/test_triton.py &
tests=$!
measure 60 memory memory --config $model --dtypes bfloat16 --lengths 131072 1048576 --plain-most 131072
wait $tests || failed=1
measure 60 train train --config $model --dtype bfloat16 --seconds 0.5 --lengths 2048 8192 32768 131072 \
    --dense-most 131072
measure 50 train-long train --config $model --dtype bfloat16 --seconds 0 --rounds 1 --lengths 1048576 \
    --checkpoint-from 1048576 --no-profile
measure 35 length length --heads 12 --dtype bfloat16 --rounds 3 --limit 1 --rivals sdpa --lengths \
    $((1<<11)) $((1<<12)) $((1<<13)) $((1<<14)) $((1<<15)) $((1<<16)) $((1<<17)) $((1<<18)) $((1<<19)) $((1<<20)) \
    $((1<<21)) $((1<<22))
measure 35 stream stream --tokens 1000000000 --chunk-size 1048576 --limit 28
measure 70 backends backends --length 32768 --seconds 0.3 --shapes 8x64 8x128 --dtypes bfloat16 float32 \
    --pattern "$paper" --error-length 1000
measure 45 length-window length --heads 12 --dtype bfloat16 --rounds 1 --rivals window --lengths $((1<<15))
exit $failed
