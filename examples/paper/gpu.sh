#!/usr/bin/env bash
# The search for the best pattern on a GPU, in one call of at most 8 minutes, from the repository's root; a second call
# resumes. The most valuable cells come first (`PLAN` in search.py).
#     bash examples/paper/gpu.sh TEXT_FILE [FOLDER] [MINUTES]
# TEXT_FILE is made beforehand, on any machine: python -m examples.paper.search --text TEXT_FILE --prepare
set -euo pipefail
text=$1
folder=${2:-examples/paper/results/search}
minutes=${3:-7}
exec "${PYTHON:-python}" -m examples.paper.search --text "$text" --output "$folder" --minutes "$minutes" \
    --jobs "${JOBS:-6}" --device cuda
