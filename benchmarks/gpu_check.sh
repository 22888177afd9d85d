#!/usr/bin/env bash
# Builds the extension, runs every test that needs a GPU, looks for bad accesses and races where compute-sanitizer is
# there, then checks and measures each backend: benchmarks/gpu_check.py. Run it in the repository's root on a machine
# with an NVIDIA GPU; no network; under 8 minutes. Results: $OUT, else benchmarks/results/.
set -uo pipefail
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
this_gpu='import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}.{minor}" + "a" * (major == 9))'
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$this_gpu")}
mkdir -p "$out"
status=()

step() { # NAME SECONDS COMMAND...: its output goes to a log; the exit code is reported
    local name=$1 seconds=$2 code
    shift 2
    timeout -s INT -k 10 "$seconds" "$@" >"$out/gpu_$name.log" 2>&1
    code=$?
    status+=("$name=$code")
    [ $code -eq 0 ] || { echo "$name ended with $code:"; tail -n 25 "$out/gpu_$name.log"; }
}

ROBUSTFAST_BUILD_CUDA=1 step build 120 python3 setup.py build_ext --inplace
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
step tests 130 python3 -m pytest -q -rf --tb=short --no-header -p no:cacheprovider $workers tests/test_triton.py \
    tests/test_loss.py tests/test_noise.py tests/test_module.py -k "cuda or triton or gpu"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step $tool 35 compute-sanitizer --tool $tool --error-exitcode 9 \
            python3 benchmarks/gpu_check.py --part cuda --checks --out "$out/gpu_$tool.json"
    done
fi
timeout -k 10 150 python3 benchmarks/gpu_check.py --out "$out/gpu_check.json" --status "${status[@]}"
