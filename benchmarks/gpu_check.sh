#!/usr/bin/env bash
# Builds the extension, runs every test that needs a GPU, then checks and measures each backend: benchmarks/gpu_check.py.
# Run it in the repository's root on a machine with an NVIDIA GPU; no network. Results: $OUT, else benchmarks/results/.
set -uo pipefail
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
this_gpu='import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}.{minor}" + "a" * (major == 9))'
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$this_gpu")}
mkdir -p "$out"
ROBUSTFAST_BUILD_CUDA=1 timeout 150 python3 setup.py build_ext --inplace >"$out/gpu_build.log" 2>&1
built=$?
[ $built -eq 0 ] || { echo "build failed ($built):"; tail -n 20 "$out/gpu_build.log"; }
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
timeout -s INT -k 10 140 python3 -m pytest -q -rf --tb=short --no-header -p no:cacheprovider $workers tests/test_triton.py \
    tests/test_loss.py tests/test_noise.py tests/test_module.py -k "cuda or triton or gpu" >"$out/gpu_tests.log" 2>&1
tested=$?
tail -n 15 "$out/gpu_tests.log"
timeout -k 10 180 python3 benchmarks/gpu_check.py --out "$out/gpu_check.json" --build "$built" --tests "$tested"
