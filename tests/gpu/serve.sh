#!/usr/bin/env bash
# Serves a model of random weights on a GPU and loads it through gRPC: 32 clients, prompts of 8K
# tokens, outputs of 1K. Prints the daemon's start-up log, the clients' figures and the daemon's own
# account of its steps.
#
#   tests/gpu/serve.sh BIN_DIR [--shape NAME] [--clients N] [--prompt N] [--output N] [-- RESAD_FLAG...]
#
# BIN_DIR has resad and resactl. The model is made once, in /tmp.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=$1
shift
shape=qwen2.5-7b clients=32 prompt=8192 output=1024
while [ $# -gt 0 ]; do
  case "$1" in
    --shape) shape=$2 ;;
    --clients) clients=$2 ;;
    --prompt) prompt=$2 ;;
    --output) output=$2 ;;
    --)
      shift
      break
      ;;
    *)
      echo "unknown argument $1; see the head of tests/gpu/serve.sh" >&2
      exit 2
      ;;
  esac
  shift 2
done

model=/tmp/resa-$shape
if [ ! -f "$model/config.json" ]; then
  echo "making $model"
  python3 "$here/make_random_model.py" --shape "$shape" --out "$model" \
    --tokenizer "${RESA_DEMO_MODEL:-$here/../../deploy/models/demo}"
fi

work=$(mktemp -d)
"$bin/resad" --model "$model" --device cuda:0 --max-context $((prompt + output + 64)) \
  --max-sequences "$clients" --listen 127.0.0.1:0 --http-listen 127.0.0.1:0 \
  --port-file "$work/ports" "$@" >"$work/log" 2>&1 &
daemon=$!
trap 'kill $daemon 2>/dev/null; wait $daemon 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 1200); do
  [ -s "$work/ports" ] && break
  kill -0 $daemon 2>/dev/null || {
    cat "$work/log"
    exit 1
  }
  sleep 0.1
done
grpc=127.0.0.1:$(sed -n 1p "$work/ports")
http=127.0.0.1:$(sed -n 2p "$work/ports")
"$bin/resactl" health --server "$grpc" --wait --timeout 120s >/dev/null || {
  cat "$work/log"
  exit 1
}
cat "$work/log"
# Once with few tokens, so that workspaces and recordings are made.
"$bin/resactl" bench --server "$grpc" --requests "$clients" --concurrency "$clients" \
  --prompt-tokens 64 --output-tokens 64 --temperature 0 >/dev/null
"$bin/resactl" bench --server "$grpc" --requests "$clients" --concurrency "$clients" \
  --prompt-tokens "$prompt" --output-tokens "$output" --temperature 0
python3 - "$http" <<'PYTHON'
import sys, urllib.request
text = urllib.request.urlopen(f"http://{sys.argv[1]}/metrics").read().decode()
for line in text.splitlines():
    if line.startswith("resa") and ("step" in line or "rectif" in line) and "bucket" not in line:
        print(line)
PYTHON
