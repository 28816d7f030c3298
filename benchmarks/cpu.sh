#!/usr/bin/env bash
# Measures the rows of benchmarks/results/cpu.json again: the head of SmolLM2-135M on this CPU.
#
#   benchmarks/cpu.sh [--clock cpu --threads 1]     (arguments go on to `fastpref bench`)
#
# Takes about half an hour on two cores that do nothing else. On a machine that does other work too, wall time
# says little: count CPU time, on one thread, as above. FILE, ROUNDS and PYTHON can be set.
set -euo pipefail
cd "$(dirname "$0")/.."

FILE="${FILE:-benchmarks/results/cpu.json}"
ROUNDS="${ROUNDS:-15}"
PYTHON="${PYTHON:-python3}"

for dtype in fp32 bf16; do
  for schedule in none frozen trainable recompute; do
    "$PYTHON" -m fastpref bench --device cpu --shape smollm2-135m@1024 --dtype "$dtype" \
      --schedule "$schedule" --backend cpp torch --op logprobs statistics dpo \
      --peers torch torch.compile trl liger --rounds "$ROUNDS" --out "$FILE" "$@"
  done
done
