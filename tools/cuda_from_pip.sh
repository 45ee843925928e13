#!/usr/bin/env bash
# Installs the CUDA 13.0 compiler from Python packages, for machines without a CUDA toolkit, and prints its folder:
#   CUDACXX=$(tools/cuda_from_pip.sh PYTHON)/bin/nvcc
# The packages name their parts without a version, and leave out two names that nvcc and CMake look for.
set -euo pipefail
python=${1:-python}
"$python" -m pip install --quiet --no-deps "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*" "nvidia-cuda-crt==13.0.*" \
  "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cccl==13.0.*" >&2
root=$("$python" -c 'import nvidia; print(next(iter(nvidia.__path__)))')/cu13
ln -sfn lib "$root/lib64"
ln -sf libcudart.so.13 "$root/lib/libcudart.so"
echo "$root"
