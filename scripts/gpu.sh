#!/usr/bin/env bash
# Ten minutes of a GPU, used well: blocks of Tables 1 and 4 and of a CIFAR row, and what the device can do.
# Needs torch, scipy, scikit-learn, pandas, safetensors, tqdm, joblib, PyYAML; no installation, no notebook tools.
#   scripts/gpu.sh [--limit 540] [--out DIR] [--device cuda] [--profile paper] [--models N] [--rows 1 2] [--beside results/paper]
# Data come from $RAB_DATA (or data/): mnist.npz, and cifar10_airplane_bird.npz for the last stage.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export RAB_DATA="${RAB_DATA:-$PWD/data}"
exec "${PYTHON:-python3}" scripts/gpu.py "$@"
