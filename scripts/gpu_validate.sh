#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU is needed for, in under ten minutes and without a network: builds the package for
# this GPU, runs tests/gpu, tunes, benchmarks, and sums up with the worst rows last.
#
# Usage: scripts/gpu_validate.sh OUTDIR [--only STAGE[,STAGE...] [STAGE...]] [--dry-run]
#
# The stages are build, tests, tune and bench. Two calls do everything, with a look at the first result between them:
# --only build tests ends within 5 minutes, --only tune bench within 4. What a stage that is cut off had done is kept.
#
# OUTDIR gets log, one JSON a stage (bench: two) and summary.json. A stage that ended well is not run again until a
# source changes; --only runs the named ones in any case. A stage that fails does not stop those after it, except build;
# the exit status is 0 only if none failed. Without a GPU, or with --dry-run, nothing is timed: it builds (or takes the build
# that is there), collects the GPU tests, holds the simulator to the golden vectors, and plans tuning and benchmark.
# PYTHON names the interpreter (default python3); it needs torch, pytest, pybind11, cmake and ninja.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
SELF=$ROOT/scripts/$(basename "$0")
PYTHON=${PYTHON:-python3}
PYTHON=$(command -v "$PYTHON")
export PATH="$(dirname "$PYTHON"):$PATH" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
STAGES="build tests tune bench"
# Where neither a GPU nor pip is at hand: the package as a folder of links (see in_place).
LINKS=$ROOT/build/links

usage() {
  sed -n '/^# Usage/,/^#$/s/^# \{0,1\}//p' "$SELF" >&2
  exit 2
}

# Seconds that a stage may take: the least of its own and of what the stage before has left of the two stages' time
# (build and tests, tune and bench). Without a GPU there is no hurry.
limit() {
  local seconds both
  case $1 in
    build) seconds=150 both=275 ;;
    tests) seconds=225 both=275 ;;
    tune) seconds=85 both=220 ;;
    bench) seconds=170 both=220 ;;
  esac
  if [ "$seconds" -gt $((both - SPENT)) ]; then seconds=$((both - SPENT)); fi
  echo $((seconds * (1 + 7 * DRY)))
}

report() { "$PYTHON" "$ROOT/scripts/gpu_report.py" "$@"; }

# What the result of a stage depends on: sources, the device, and whether this is a dry run. Tables that a run writes
# are no sources.
key() {
  (
    cd "$ROOT"
    find csrc kernels peftkern benchmarks tests scripts setup.py CMakeLists.txt pyproject.toml -type f \
      ! -name '*.pyc' ! -name '*.so' ! -path 'peftkern/tuned/*' ! -path 'benchmarks/results/*' -print0 |
      LC_ALL=C sort -z | xargs -0 sha256sum
    echo "$DRY $DEVICE"
  ) | sha256sum | cut -c1-16
}

device() { "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'; }

imports() { "$PYTHON" -c 'import peftkern._C, peftkern.kernels.configs, peftkern.benchmarks.bench' 2>/dev/null; }

# The package by links, for a Python that pip cannot install into. Not the source folder itself: it lacks the folders
# that pyproject.toml maps into the package.
in_place() {
  "$PYTHON" setup.py -q build_ext --inplace
  rm -rf "$LINKS"
  mkdir -p "$LINKS/peftkern"
  for file in peftkern/*; do ln -s "$ROOT/$file" "$LINKS/peftkern/"; done
  ln -sfn "$ROOT/kernels/tl" "$LINKS/peftkern/kernels"
  ln -sfn "$ROOT/benchmarks" "$LINKS/peftkern/benchmarks"
}

use_links() {
  if [ -d "$LINKS" ]; then export PYTHONPATH="$LINKS${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1; fi
}

stage_build() {
  if [ "$DRY" = 1 ] && imports; then
    echo "the build that is there is taken"
  else
    if [ "$DRY" = 0 ]; then
      PEFTKERN_CUDA_ARCHITECTURES=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
      export PEFTKERN_CUDA_ARCHITECTURES PEFTKERN_CUDA=ON
    fi
    rm -rf "$LINKS"
    # Objects stay: a build that was cut off goes on where it was.
    export PEFTKERN_BUILD_DIR=$ROOT/build/validate
    "$PYTHON" -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e . || in_place
    use_links
    imports
  fi
  "$PYTHON" -m peftkern doctor --json "$OUT/build.json"
  report build "$OUT/build.json" "$DRY"
}

# Several processes compile Triton kernels at once, where pytest can.
workers() {
  local count=$(($(nproc) - 2))
  if [ "$count" -gt 12 ]; then count=12; fi
  if [ "$count" -gt 1 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then echo "-n $count --dist loadgroup"; fi
}

stage_tests() {
  local junit status=0
  set -o pipefail
  junit=$(mktemp)
  # Interrupted in time, pytest still writes what it has, unless a kernel hangs; its lines are there in any case.
  if [ "$DRY" = 1 ]; then
    "$PYTHON" -m pytest -q -p no:cacheprovider --collect-only tests/gpu >"$junit.collected" || status=$?
    tail -n 1 "$junit.collected"
    "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$junit" tests/sim/instructions/test_golden.py || status=$?
  else
    # shellcheck disable=SC2046
    timeout -s INT -k 15 $((LIMIT - 20)) "$PYTHON" -m pytest -v -p no:cacheprovider --durations 15 \
      $(workers) --junitxml "$junit" -o junit_family=xunit1 tests/gpu | tee "$junit.said" || status=$?
  fi
  report tests "$junit" "$OUT/tests.json" || status=1
  rm -f "$junit" "$junit.collected" "$junit.said"
  return "$status"
}

stage_tune() {
  local status=0
  if [ "$DRY" = 1 ]; then
    "$PYTHON" -m peftkern tune --cuda --dry-run --json "$OUT/tune.json"
    return
  fi
  timeout -k 5 $((LIMIT - 10)) "$PYTHON" -m peftkern tune --cuda --seconds $((LIMIT - 25)) --json "$OUT/tune.json" ||
    status=1
  # The benchmark after this chooses by it, by a part as well.
  report install "$OUT/tune.json" || status=1
  return "$status"
}

stage_bench() {
  local status=0
  if [ "$DRY" = 1 ]; then
    report plan "$OUT/bench.json" lora_linear "$OUT/decode.json" multi_lora_linear
    return
  fi
  # The sizes that limits are stated on, and no more than half of the time for them. Both files grow block by block.
  timeout -k 10 $((LIMIT / 2)) "$PYTHON" -m peftkern bench --op lora_linear --preset gpu --seconds 2.5 \
    --shape 8192,4096,4096 8192,4096,14336 --json "$OUT/bench.json" || status=1
  "$PYTHON" -m peftkern bench --op multi_lora_linear --preset gpu --seconds 1.5 --json "$OUT/decode.json" || status=1
  return "$status"
}

# One stage in a process of its own, so that its time can be limited.
inside() {
  cd "$ROOT"
  use_links
  if [ "$1" != build ] && [ "${BUILT:-0}" = 0 ] && ! imports; then
    echo "peftkern is not built here: --only build" >&2
    return 1
  fi
  "stage_$1"
}

run_stage() {
  local name=$1 started=$SECONDS status=0
  LIMIT=$(limit "$name")
  printf '== %s (at most %s s)\n' "$name" "$LIMIT"
  timeout -k 5 "$LIMIT" bash "$SELF" --inside "$name" "$OUT" "$DRY" "$DEVICE" "$LIMIT" || status=$?
  [ "$status" != 124 ] || echo "$name: out of time; what it had done is kept"
  report stage "$OUT" "$name" "$status" $((SECONDS - started)) "$KEY"
  SPENT=$((SECONDS - started))
  return "$status"
}

run_all() {
  local failed=0
  for name in $STAGES; do
    case " ${ONLY:-$STAGES} " in *" $name "*) ;; *) continue ;; esac
    case $name in build | tune) SPENT=0 ;; esac
    if [ -z "$ONLY" ] && report current "$OUT" "$name" "$KEY"; then
      echo "== $name: done before, nothing has changed"
    elif ! run_stage "$name"; then
      failed=1
      if [ "$name" = build ]; then break; fi
    elif [ "$name" = build ]; then
      export BUILT=1 # and imported: the stages after it need not look
    fi
  done
  use_links
  report summary "$OUT" "$DRY" || failed=1
  return "$failed"
}

# The log stays under 1 MB: its beginning and its end.
trim() {
  if [ "$(wc -c <"$1")" -gt 900000 ]; then
    { head -c 300000 "$1" && printf '\n...\n' && tail -c 590000 "$1"; } >"$1.part"
    mv "$1.part" "$1"
  fi
}

# Whether a word is a stage, or several with commas between them.
stages() {
  local name
  [ -n "${1//,/}" ] || return 1
  for name in ${1//,/ }; do
    case " $STAGES " in *" $name "*) ;; *) return 1 ;; esac
  done
}

main() {
  OUT="" ONLY="" DRY=0 SPENT=0 BUILT=0
  while [ $# -gt 0 ]; do
    case $1 in
      --only)
        [ $# -gt 1 ] && stages "$2" || usage
        while [ $# -gt 1 ] && stages "$2"; do
          ONLY="$ONLY ${2//,/ }"
          shift
        done
        ;;
      --dry-run) DRY=1 ;;
      -*) usage ;;
      *) [ -z "$OUT" ] || usage; OUT=$1 ;;
    esac
    shift
  done
  [ -n "$OUT" ] || usage
  mkdir -p "$OUT"
  OUT=$(cd "$OUT" && pwd)
  DEVICE=$(device)
  if [ -z "$DEVICE" ] && [ "$DRY" = 0 ]; then
    echo "torch sees no CUDA device: a dry run"
    DRY=1
  fi
  KEY=$(key)
  local status=0
  set -o pipefail
  run_all 2>&1 | tee -a "$OUT/log" || status=1
  # What a writer that was killed has left.
  rm -f "$OUT"/*.tmp
  trim "$OUT/log"
  return "$status"
}

if [ "${1:-}" = --inside ]; then
  OUT=$3 DRY=$4 DEVICE=$5 LIMIT=$6
  inside "$2"
else
  main "$@"
fi
