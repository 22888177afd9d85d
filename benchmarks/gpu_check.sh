#!/usr/bin/env bash
# Builds, checks and measures everything on this machine's NVIDIA GPU: one table, one JSON file. See gpu_check/__main__.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
