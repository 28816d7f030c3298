#!/usr/bin/env bash
# Builds, checks and measures fastpref on a machine with an NVIDIA GPU. Needs no network.
#
#   benchmarks/gpu.sh                 every stage, one after the other
#   benchmarks/gpu.sh STAGE...        only these, in this order; each takes less than ten minutes
#   benchmarks/gpu.sh --list          the stages
#
# Logs and JSON go to $OUT if set, else to benchmarks/results. A stage that fails does not stop the next ones;
# the exit status is then 1. PYTHON (default python3) needs torch with CUDA, triton, setuptools, wheel, ninja,
# pybind11, pytest and matplotlib; the kernels are compiled with nvcc. Peers that are not installed are listed as such.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-$PWD/benchmarks/results}"
LIMIT="${LIMIT:-590}"
ROUNDS="${ROUNDS:-15}"
# The installed package, not the checkout in the working directory, which has no compiled module.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

STAGES=(
  "build      compile the kernels for this GPU and install the package"
  "kernels    tests marked gpu of the Triton and CUDA row kernels"
  "op         tests marked gpu of the whole op: hostile inputs, graphs, streams, no sync"
  "models     tests marked gpu of the whole op: the heads of real models, and its peak memory"
  "memcheck   compute-sanitizer memcheck, every kernel on one shape"
  "racecheck  compute-sanitizer racecheck"
  "initcheck  compute-sanitizer initcheck"
  "ceilings   a large copy and a large matrix product"
  "small      bench: head of Qwen2.5-0.5B, 8,192 rows, bf16"
  "medium     bench: head of Llama-3.2-1B, 8,192 rows, bf16"
  "large      bench: head of Llama-3-8B, 8,192 rows, bf16"
  "kept       bench: the same three with a budget that holds all of E"
  "lengths    bench: head of Llama-3-8B, 1,024, 4,096 and 32,768 rows; this package and the floor"
  "heads      bench: the other heads, 8,192 rows; this package and the floor"
  "along-n    cost curve against N, to 65,536 rows"
  "along-v    cost curve against V, to 1,048,576 entries"
)

build() {
  local arch
  arch="$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" || return 1
  FASTPREF_CUDA=1 FASTPREF_FORCE_BUILD=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" \
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index . || return 1
  "$PYTHON" -m fastpref doctor || true # its status also counts packages that only training needs
}

# Named files: collecting the others would need what only training needs.
gpu_tests() { "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --durations=10 "$@"; }

sanitize() {
  # Without torch's caching allocator every buffer is an allocation of its own, with edges to step over.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --target-processes all \
    --error-exitcode 1 "$PYTHON" benchmarks/one_of_each.py
}

# Of the checkout: the installed package knows none.
COMMIT="${COMMIT:-$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)}"

bench() {
  "$PYTHON" -m fastpref bench --device cuda --dtype bf16 --rounds "$ROUNDS" --out "$OUT/gpu.json" \
    --commit "$COMMIT" "$@"
}

curve() {
  "$PYTHON" benchmarks/curves.py --device cuda --along "$1" --head llama-3.2-1b --commit "$COMMIT" \
    --out "$OUT/curves-cuda.json"
}

run() {
  case "$1" in
    build) build ;;
    kernels) gpu_tests tests/test_triton_kernels.py tests/test_triton_rows.py tests/test_cuda_kernels.py ;;
    op) gpu_tests tests/test_gpu_op.py -k "not real_models and not peak_memory" ;;
    models) gpu_tests tests/test_gpu_op.py -k "real_models or peak_memory" ;;
    memcheck | racecheck | initcheck) sanitize "$1" ;;
    ceilings) "$PYTHON" benchmarks/ceilings.py "$OUT/ceilings.json" ;;
    small) bench --shape qwen2.5-0.5b@8192 ;;
    medium) bench --shape llama-3.2-1b@8192 ;;
    large) bench --shape llama-3-8b@8192 ;;
    kept)
      bench --shape qwen2.5-0.5b@8192 llama-3.2-1b@8192 llama-3-8b@8192 --schedule trainable \
        --budget 16384 --peers none --out "$OUT/gpu-kept.json"
      ;;
    lengths) bench --shape llama-3-8b@1024 llama-3-8b@4096 llama-3-8b@32768 --op logprobs --peers none ;;
    heads)
      bench --shape smollm2-135m@8192 gemma-2-2b@8192 qwen3-8b@8192 qwen2.5-32b@8192 gemma-3-27b@8192 \
        --op logprobs --peers none
      ;;
    along-n) curve N ;;
    along-v) curve V ;;
  esac
}

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  printf '  %s\n' "${STAGES[@]}"
}

names=()
for stage in "${STAGES[@]}"; do names+=("${stage%% *}"); done

case "${1:-}" in
  -h | --help | --list)
    usage
    exit 0
    ;;
  --stage) # one stage in this process: how the time limit is kept
    run "$2"
    exit
    ;;
esac

chosen=("$@")
[ "$#" -gt 0 ] || chosen=("${names[@]}")
for stage in "${chosen[@]}"; do
  if [[ " ${names[*]} " != *" $stage "* ]]; then
    echo "gpu.sh: no stage '$stage'" >&2
    usage >&2
    exit 2
  fi
done

mkdir -p "$OUT"
export OUT
failed=()
for stage in "${chosen[@]}"; do
  echo "== $stage"
  started=$SECONDS
  if timeout "$LIMIT" bash benchmarks/gpu.sh --stage "$stage" 2>&1 | tee "$OUT/gpu-$stage.log"; then
    echo "== $stage: done in $((SECONDS - started)) s"
  else
    echo "== $stage: FAILED after $((SECONDS - started)) s"
    failed+=("$stage")
  fi
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
