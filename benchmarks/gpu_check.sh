#!/usr/bin/env bash
# Everything that needs a GPU, in one go, on a machine that has one, nvcc, and Python with torch, transformers and the
# package's other dependencies; nothing is downloaded.
#
#   OUT=results bash benchmarks/gpu_check.sh          PYTHON=python3.12 names another interpreter
#
# Builds both libraries for this GPU, runs the CUDA tests (none may skip), the same hostile streams and a small decode under
# compute-sanitizer (memory, races in shared memory, barriers), and the benchmarks. Writes into $OUT: tests.txt, memcheck.txt,
# racecheck.txt, synccheck.txt, cuda.json, cpu.json, summary.txt. Exits with 1 if anything failed, after all of it has run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export PYTHONPATH=. OMP_NUM_THREADS=8 FAIL_WITHOUT_CUDA=1
failed=()

step() {  # step NAME LOG COMMAND...
    local name=$1 log=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    if "$@" >"$OUT/$log" 2>&1; then
        echo "$name: passed in $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    else
        echo "$name: FAILED in $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
        tail -n 40 "$OUT/$log"
        failed+=("$name")
    fi
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$OUT/summary.txt"
"$PYTHON" -c "import torch, transformers; print(torch.__version__, transformers.__version__)" | tee -a "$OUT/summary.txt"
capability=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} CACHEGEN_BUILD_CUDA=1
step build build.txt "$PYTHON" setup.py -q build_ext --inplace --force
step tests tests.txt "$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= tests/test_cuda.py
for tool in memcheck racecheck synccheck; do  # of torch's kernels they would find what is not ours
    step "$tool" "$tool.txt" compute-sanitizer --tool "$tool" --kernel-regex kns=cachegen --error-exitcode 7 "$PYTHON" -m \
        pytest -q -p no:cacheprovider -o addopts= tests/test_cuda.py -k "hostile or values_of_here or same_symbols"
done
step bench_cuda bench_cuda.txt "$PYTHON" -m benchmarks.bench_cuda --out "$OUT/cuda.json"
step bench_cpu bench_cpu.txt "$PYTHON" -m benchmarks.bench_codec --rounds 3 --out "$OUT/cpu.json"
cat "$OUT/summary.txt"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
