#!/usr/bin/env bash
# What only a GPU can tell, in under ten minutes: the tests with the mark gpu, then images a second beside timm's parts.
#
#   benchmarks/gpu.sh > docs/gpu.md                  # on a machine with a GPU
#   DEVICE=cpu benchmarks/gpu.sh                     # the same with tiny sizes, to see whether the script works
set -eu -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
export MIXUP_RECIPES_TEST_DEVICE=$DEVICE PYTHONPATH=.
echo '# Measured on a GPU'
echo
echo '```'
failed=0
"$PYTHON" -m pytest -q -m gpu -n 0 tests/test_device.py | tail -n 30 || failed=1
echo '```'
echo
if [ "$DEVICE" = cpu ]; then
  "$PYTHON" benchmarks/device.py --models resnet10t deit_tiny_patch16_224 --size 64 --batch 4 --updates 1 --repeats 1 --precision no
else
  timeout 400 "$PYTHON" benchmarks/device.py
fi
exit "$failed"
