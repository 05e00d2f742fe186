#!/usr/bin/env bash
# Everything that needs a GPU, in at most 7 minutes, the most important first, on a machine that has one and Python with
# torch, transformers and the package's other dependencies; nothing is downloaded.
#
#   OUT=results bash benchmarks/gpu_check.sh          PYTHON=python3.12 names another interpreter
#   TRY=1 OUT=results bash benchmarks/gpu_check.sh    tries every step on a machine without a GPU, with small sizes
#
# Both libraries are carried prebuilt (hf_cachegen/_cpu.so and hf_cachegen/_cuda.so; python setup.py build_ext --inplace makes
# them where there is nvcc). One that is missing or does not load is compiled here, without setuptools. Then: does the GPU run
# the library, and has it all functions; the CUDA tests, none of which may skip; speeds; klt's products; the product path on
# a random 8B model; the host's work; hostile streams and small decodes under compute-sanitizer (memory, races in shared
# memory). Every step has a limit, and a failure stops no other. Writes 8 files into $OUT: summary.txt, tests.txt, bench.txt, cuda.json, klt.json, product.json,
# host.json, sanitizer.txt. Exits with 1 if anything failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
TRY=${TRY:-}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8 HF_HUB_OFFLINE=1
TESTS=("$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= -o filterwarnings=default tests/test_cuda.py)
BENCH=() KLT=() PRODUCT=() HOST=()
if [[ $TRY ]]; then
    BENCH=(--device cpu --tokens 512 --layers 2) PRODUCT=(--device cpu --hidden 256 --layers 2 --tokens 512 --rounds 1)
    HOST=(--layers 2) KLT=(--device cpu --layers 2 --width 64 --chunk 16)
else
    export FAIL_WITHOUT_CUDA=1
fi
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

loads() {  # loads NAME: whether the library is there, of this ABI, and built for this system
    "$PYTHON" -c "from hf_cachegen.codec import native; native.load(native.$1)" >>"$OUT/bench.txt" 2>&1
}

rm -f "$OUT"/{summary,tests,bench,sanitizer}.txt "$OUT"/{cuda,klt,product,host}.json
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv 2>&1 | tee "$OUT/summary.txt"
if ! loads LIBRARY; then
    step build_cpu 60 bench.txt g++ -std=c++17 -O3 -DNDEBUG -fPIC -shared -fvisibility=hidden -pthread -ffp-contract=off \
        cuda_ext/cpu/*.cpp -o hf_cachegen/_cpu.so
fi
if [[ ! $TRY ]] && ! loads CUDA_LIBRARY; then
    capability=$("$PYTHON" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    step build_cuda 150 bench.txt nvcc -std=c++17 -O3 -shared --cudart=static --extended-lambda --threads=0 --fmad=false \
        -Xcompiler=-fPIC,-fvisibility=hidden -gencode="arch=compute_$capability,code=sm_$capability" cuda_ext/cuda/*.cu \
        -o hf_cachegen/_cuda.so
fi
step probe 30 summary.txt "$PYTHON" -c "
import os, torch, transformers
from hf_cachegen.codec import native
print('torch', torch.__version__, 'transformers', transformers.__version__)
library = native.load(native.LIBRARY if os.environ.get('TRY') else native.CUDA_LIBRARY)
found = native.probe(library)
wanted = ('cg_decode_chunks', 'cg_write_heads', 'cg_block_sums', 'cg_gather_operands', 'cg_read_parts')
missing = [] if os.environ.get('TRY') else [name for name in wanted if not hasattr(library, name)]
print(found, 'missing functions:', missing)
raise SystemExit(bool(found.reason or missing))"
step tests 100 tests.txt "${TESTS[@]}" --durations=8
step bench_cuda 60 bench.txt "$PYTHON" -m benchmarks.bench_cuda --out "$OUT/cuda.json" "${BENCH[@]}"
step klt 45 bench.txt "$PYTHON" -m benchmarks.gpu_klt --out "$OUT/klt.json" "${KLT[@]}"
step product 70 bench.txt "$PYTHON" -m benchmarks.gpu_product --out "$OUT/product.json" "${PRODUCT[@]}"
step host 25 bench.txt "$PYTHON" -m benchmarks.host_time --out "$OUT/host.json" "${HOST[@]}"
for tool in memcheck racecheck; do  # limited to this library's kernels: torch makes calls that fail, and handles that
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 45 sanitizer.txt compute-sanitizer --tool "$tool" --launch-timeout 0 \
        --report-api-errors no --kernel-name kns=cachegen --error-exitcode 7 \
        "${TESTS[@]}" -k "few_hostile or small_batch or sums_of_blocks or products_of_chained"
done
cat "$OUT/summary.txt"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
