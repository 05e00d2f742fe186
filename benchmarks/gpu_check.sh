#!/usr/bin/env bash
# Everything that needs a GPU, in at most 6 minutes, the most important first, on a machine that has one and Python with
# torch, transformers and the package's other dependencies; nothing is downloaded.
#
#   OUT=results bash benchmarks/gpu_check.sh          PYTHON=python3.12 names another interpreter
#
# Both libraries are carried prebuilt (python setup.py build_ext --inplace, where there is nvcc); one that is missing is built
# here. Then: does the GPU run the library; the CUDA tests, none of which may skip; speeds; the product path on a random 8B
# model; hostile streams and a small decode under compute-sanitizer (memory, races in shared memory). Every step has a limit,
# and a failure stops no other. Writes 7 files into $OUT: summary.txt, tests.txt, bench.txt, cuda.json, product.json,
# memcheck.txt, racecheck.txt. Exits with 1 if anything failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8 FAIL_WITHOUT_CUDA=1
TESTS=("$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= -o filterwarnings=default tests/test_cuda.py)
failed=()

step() {  # step NAME SECONDS LOG COMMAND...
    local name=$1 limit=$2 log=$3 start=$SECONDS
    shift 3
    echo "== $name (at most $limit s): $*"
    if timeout --kill-after=5 "$limit" "$@" >>"$OUT/$log" 2>&1; then
        echo "$name: passed in $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    else
        echo "$name: FAILED in $((SECONDS - start)) s of $limit" | tee -a "$OUT/summary.txt"
        tail -n 30 "$OUT/$log"
        failed+=("$name")
    fi
}

rm -f "$OUT"/{summary,tests,bench,memcheck,racecheck}.txt
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$OUT/summary.txt"
if [[ ! -f hf_cachegen/_cpu.so || ! -f hf_cachegen/_cuda.so ]]; then
    capability=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} CACHEGEN_BUILD_CUDA=1 \
        step build 60 bench.txt "$PYTHON" setup.py -q build_ext --inplace
fi
step probe 30 summary.txt "$PYTHON" -c "
import torch, transformers
from hf_cachegen.codec import native
print('torch', torch.__version__, 'transformers', transformers.__version__)
found = native.probe(native.load(native.CUDA_LIBRARY))
print(found)
raise SystemExit(bool(found.reason))"
step tests 80 tests.txt "${TESTS[@]}"
step bench_cuda 70 bench.txt "$PYTHON" -m benchmarks.bench_cuda --out "$OUT/cuda.json"
step product 60 bench.txt "$PYTHON" -m benchmarks.gpu_product --out "$OUT/product.json"
for tool in memcheck racecheck; do  # limited to this library's kernels
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 50 "$tool.txt" compute-sanitizer --tool "$tool" \
        --kernel-regex kns=cachegen --error-exitcode 7 "${TESTS[@]}" -k "hostile or small_batch"
done
cat "$OUT/summary.txt"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
