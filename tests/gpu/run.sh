#!/usr/bin/env bash
# All tests that need a GPU, on one of them, in less than 8 minutes; at the end a table of what they measured.
#
#   tests/gpu/run.sh            with the packages of `python`: in a container, or PYTHON=.venv/bin/python tests/gpu/run.sh;
#                               NVIDIA's image lacks two of them: pip install --no-deps hypothesis sortedcontainers
#   tests/gpu/run.sh WHEELS     without a network: with the wheels that pack_wheels.py has put into a folder, and what
#                               `python` has, which must be PyTorch for the GPU at least; nothing of it is changed
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
wheels=${1:+$(cd "$1" && pwd)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl
  export PYTHONPATH=$work/site
fi
if ! missing=$("$python" -c 'import hypothesis, pytest' 2>&1); then
  echo "${missing##*$'\n'}; the tests need it: $python -m pip install --no-deps pytest iniconfig pluggy hypothesis sortedcontainers" >&2
  exit 2
fi
# Not in the checkout: Python would take its nemo_pvs/, which lacks recipes and conversions, for the installed one.
cp -r "$root/tests" "$root/pyproject.toml" "$work"
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
# An interrupt, after which pytest still prints what it has measured.
timeout --signal=INT --kill-after=20 480 "$python" -m pytest -m gpu -p no:cacheprovider -p no:randomly --basetemp "$work/tmp" --no-header -q tests/gpu
