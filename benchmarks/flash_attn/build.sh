#!/usr/bin/env bash
# Build flash-attn 2.8.3.post2 for sm_90, bfloat16 alone, with kernels of 64 and 128 wide heads, into FOLDER:
#     PYTHON=.venv/bin/python bash benchmarks/flash_attn/build.sh FOLDER
# Needs no GPU, but nvcc (CUDA_HOME) and, in PYTHON's environment, the torch and Python versions of the machine that
# will run it, with setuptools, wheel, packaging, psutil and ninja. Ten minutes on one core; the wheel has 3.6 MB.
#
# `bfloat16_sm90.patch` leaves out float16, heads above 128, dropout, ALiBi, softcap, windows and the kernels that
# split keys over blocks; calls that need them raise. Heads below 64, and from 65 to 127, take the next larger kernel.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=$(cd "$(dirname "${PYTHON:-$(command -v python)}")" && pwd)/python
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH=$(dirname "$python"):$CUDA_HOME/bin:$PATH
export FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=90 NVCC_THREADS=1 MAX_JOBS=${MAX_JOBS:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
"$python" -m pip download -q --no-deps --no-build-isolation --no-binary flash-attn flash-attn==2.8.3.post2
tar -xzf flash_attn-*.tar.gz --strip-components=1
patch -p1 <"$here/bfloat16_sm90.patch"
"$python" setup.py -q bdist_wheel --dist-dir "$folder"
ls -l "$folder"/flash_attn-*.whl
