#!/usr/bin/env bash
# Everything that needs a GPU, from the repository's root, in parts, the most valuable first. A part that is
# run again skips what it has measured.
#     bash benchmarks/gpu.sh FOLDER [PART ...]        # default: proof kernels patterns train
# Parts, and the most seconds that each takes on an H100:
#     proof 150     the tests of the kernels and of flash-attn (if installed)
#     kernels 200   op, op-wide, backends: against the fastest dense kernels
#     patterns 60   the patterns beyond the paper beside the paper's and FlexAttention's window
#     tune 125      block sizes and variants of the kernels
#     train 120     tokens per second of the 125M model up to 131,072 tokens, and a step of 2^20
#     million 120   20 steps on texts of 2^20 tokens by the stock Trainer; needs TEXT
#     quality 420   examples/paper/gpu.sh: which pattern is best; needs TEXT
#     more 200      length, memory, stream
# TEXT is a file of tokens, made beforehand: python -m examples.paper.search --text FILE --prepare
# The exit status says whether a part failed. `make figures` draws the results.
set -uo pipefail
folder=${1:?the folder for the JSON files}
shift
parts=${*:-proof kernels patterns train}
python=${PYTHON:-python}
machine=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
paper='2048/1 4096/2 8192/4 16384/6 32768/12'
model=configuration/longnet-125m.json
failed=0
mkdir -p "$folder"

measure() { # seconds allowed, file, name, options
    local limit=$1 file=$2
    shift 2
    ls "$folder/$file-$machine-"*.json >/dev/null 2>&1 && return
    echo "== $*"
    timeout "$limit" "$python" -m benchmarks.run "$@" --device cuda \
        --output "$folder/$file-$machine-$(date -u +%Y-%m-%dT%H%M).json" || failed=1
}

proof() {
    local pytest="$python -m pytest -q -p no:cacheprovider"
    HF_HUB_OFFLINE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout 60 $pytest tests/test_flash_attn.py || failed=1
    HF_HUB_OFFLINE=1 timeout 90 $pytest -n 8 tests/test_triton.py || failed=1
}
kernels() {
    measure 65 op op --lengths 32768 131072 --dtypes bfloat16 --seconds 0.4 --dense-limit 2
    measure 25 op-wide op --heads 16 --head-dim 128 --lengths 32768 --dtypes bfloat16 --seconds 0.4 --patterns "$paper"
    measure 70 backends backends --length 32768 --seconds 0.3 --shapes 8x64 8x128 --dtypes bfloat16 float32 \
        --pattern "$paper" --error-length 1000
}
patterns() {
    measure 60 patterns patterns --dtypes bfloat16 --lengths 2048 8192 32768 131072 1048576 --seconds 0.3 \
        --train-lengths 8192 32768 --contexts 32768 --patterns "$paper" 'w1024 4096/2 8192/4 16384/6 32768/12 rotate stagger' \
        'w1024 4096/2 8192/4 16384/8 32768/8 rotate stagger once' 'w1024 32768/32:1 once' 'w1024 32768/16:1 once every2' \
        'w1024' 'flex 1024'
}
tune() {
    timeout 125 "$python" -m benchmarks.tune --output "$folder/tune-$machine.json" || failed=1
}
train() {
    measure 60 train train --config $model --dtype bfloat16 --seconds 0.5 --lengths 2048 8192 32768 131072 \
        --dense-most 131072
    measure 50 train-long train --config $model --dtype bfloat16 --seconds 0 --rounds 1 --lengths 1048576 \
        --checkpoint-from 1048576 --no-profile
}
million() {
    timeout 120 "$python" -m benchmarks.million --text "$TEXT" --device cuda \
        --output "$folder/million-$machine.json" || failed=1
}
quality() {
    bash examples/paper/gpu.sh "$TEXT" "$folder/search" 6.5 || failed=1
}
more() {
    measure 60 memory memory --config $model --dtypes bfloat16 --lengths 131072 1048576 --plain-most 131072
    measure 35 length length --heads 12 --dtype bfloat16 --rounds 3 --limit 1 --rivals sdpa --lengths \
        $((1<<11)) $((1<<12)) $((1<<13)) $((1<<14)) $((1<<15)) $((1<<16)) $((1<<17)) $((1<<18)) $((1<<19)) $((1<<20)) \
        $((1<<21)) $((1<<22))
    measure 35 stream stream --tokens 1000000000 --chunk-size 1048576 --limit 28
    measure 45 length-window length --heads 12 --dtype bfloat16 --rounds 1 --rivals window --lengths $((1<<15))
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
for part in $parts; do
    case $part in
        proof | kernels | patterns | tune | train | million | quality | more) "$part" ;;
        *) echo "no part $part" >&2; failed=1 ;;
    esac
done
exit $failed
