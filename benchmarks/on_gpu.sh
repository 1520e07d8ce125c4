#!/usr/bin/env bash
# What only a GPU can show, spread over the GPUs of one host, one job at a time on each:
#   bash benchmarks/on_gpu.sh SECONDS [JOB ...]        e.g. 560 tests "cell vit_b_16 32" "auto encoder 1" loads
# A job is tests, loads, patches, endurance, engine, doctor, bench, "cell MODEL BATCH" or "auto MODEL BATCH"; or
# "layers MODEL BATCH", where its time goes; "threads MODEL [CALLS]", a part of endurance; "pytest FILE"; "again MODEL PRECISION
# TIMES", which proves one engine in a process after the other. Without any, all of the first line. Each has the rest of
# SECONDS. Logs and figures are packed into $OUT/on_gpu.tgz as every job ends, and the end of each log is printed.
# Artifacts stay in /tmp/peers for the next call on the same machine.
set -u
deadline=$((SECONDS + $1)) && shift
out=${OUT:?} logs=$(mktemp -d) work=/tmp/peers
gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / gpus))}
export TORCHINDUCTOR_COMPILE_THREADS=$OMP_NUM_THREADS
models=(vit_b_16 swin_t encoder efficientnet_b0 resnet50 mobilenet_v2 resnet18)

if (($#)); then printf '%s\n' "$@" >"$logs/queue"; else
  printf '%s\n' tests >"$logs/queue"
  for batch in 32 1; do printf "cell %s $batch\n" "${models[@]}" >>"$logs/queue"; done
  printf '%s\n' endurance patches loads bench engine doctor >>"$logs/queue"
  for batch in 32 1; do printf "auto %s $batch\n" "${models[@]}" >>"$logs/queue"; done
fi

next() { # takes the queue's first line
  flock "$logs/lock" bash -c 'head -n 1 "$1" && sed -i 1d "$1"' _ "$logs/queue"
}

peers() { python3 benchmarks/peers.py --folder $work --jobs 1 --timeout 580 --json "$logs/peers-$CUDA_VISIBLE_DEVICES.jsonl" "$@"; }

again() { # MODEL PRECISION TIMES
  local failed=0
  sed "s/\\[fp32, fp16, bf16\\]/[$2]/" "configs/$1.yaml" >configs/_again.yaml
  python3 -m trtforge convert configs/_again.yaml --only "$1-$2" -o $work/again || failed=$?
  rm configs/_again.yaml
  for ((turn = 0; turn < $3; turn++)); do
    python3 -m trtforge validate "$work/again/$1-$2" || failed=$?
  done
  return $failed
}

job() {
  case $1 in
    tests)
      OMP_NUM_THREADS=3 TRTFORGE_CARRIED=$PWD/.gpu/carried TRTFORGE_RESULTS=$logs/results.jsonl python3 -m pytest tests/gpu -v -ra \
        -p no:benchmark -p no:cacheprovider -n 8 --dist load --maxschedchunk=1 --durations=10 --tb=short --show-capture=no ;;
    cell) peers --models "$2" --batches "$3" ;;
    auto) peers --models "$2" --batches "$3" --sides --auto ;;
    layers) peers --models "$2" --batches "$3" --prepare-only &&
      python3 benchmarks/peers.py --child layers --models "$2" --batches "$3" --folder $work ;;
    loads) peers --models vit_b_16 --batches 1 --sides --loads vit_b_16 ;;
    patches) python3 benchmarks/patches.py --json "$logs/patches.jsonl" ;;
    pytest) python3 -m pytest "${@:2}" -v -ra -p no:benchmark -p no:cacheprovider --tb=short ;;
    threads) python3 benchmarks/endurance.py --parts threads --model "${2:-digits}" --calls "${3:-100000}" --json "$logs/endurance.jsonl" ;;
    endurance) python3 benchmarks/endurance.py --json "$logs/endurance.jsonl" ;;
    engine) python3 benchmarks/engine.py --no-compile ;;
    doctor) python3 -m trtforge doctor ;;
    bench) peers --models resnet18 --batches 1 --prepare-only && python3 -m trtforge bench $work/resnet18-1-fp16 ;;
    again) again "$2" "$3" "$4" ;;
    *) echo "no such job: $*" && return 2 ;;
  esac
}

worker() {
  export CUDA_VISIBLE_DEVICES=$1
  local line name began rc
  while line=$(next) && [ -n "$line" ] && ((SECONDS < deadline - 20)); do
    name=${line//[ \/]/-} began=$SECONDS
    # shellcheck disable=SC2086
    timeout $((deadline - SECONDS)) bash -c 'job $0' "$line" >"$logs/$name.log" 2>&1
    rc=$?
    flock "$logs/lock" bash -c '
      printf "== %s: exit %s after %s s\n" "$1" "$2" "$3"; grep -v PASSED "$4" | tail -n 12 | cut -c1-300
      tar -C "${4%/*}" -czf "$5/on_gpu.tgz" --exclude lock --exclude queue .' _ "$line" $rc $((SECONDS - began)) "$logs/$name.log" "$out"
  done
}

export -f again job peers && export logs work
python3 examples/digits/train.py >"$logs/train.log" 2>&1
for ((gpu = 0; gpu < gpus; gpu++)); do worker $gpu & done
wait
