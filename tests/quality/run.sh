#!/usr/bin/env bash
# Runs a script of this folder in a Python environment made for it (build/venv-quality):
#
#   tests/quality/run.sh evaluate.py --task recall --samples 20 --mode dense
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
venv="$here/../../build/venv-quality"
if [ $# -lt 1 ] || [ ! -f "$here/$1" ]; then
  echo "usage: tests/quality/run.sh {evaluate.py|make_prompts.py|tasks_test.py} ARGUMENT..." >&2
  exit 2
fi
if ! "$venv/bin/python" -c 'import grpc_tools, numpy' 2>/dev/null; then
  echo "==> Making a Python environment in build/venv-quality." >&2
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt" >&2
fi
script=$1
shift
exec "$venv/bin/python" "$here/$script" "$@"
