#!/usr/bin/env bash
# A folder of the small packages that a bare image lacks: it has jax, flax, optax and orbax.
#
#   ./launch/wheels.sh DIR [PYTHON_VERSION]     default 3.12, the image's
#   PYTHONPATH=DIR python -m experiments.benchmark --suite=device --budget_secs=500 --out=OUT
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:?a folder to make, and perhaps the Python version that reads it}
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
"$python" -m pip install --quiet --no-deps --only-binary=:all: --python-version="${2:-3.12}" \
  --target="$directory" absl-py array-record attrs cloudpickle etils fsspec grain humanize \
  immutabledict importlib_resources jaxtyping ml-collections more-itertools pillow portpicker \
  protobuf psutil requests safetensors six tensorflow-datasets tensorflow-metadata \
  googleapis-common-protos tokenizers huggingface_hub toml tqdm wadler-lindig wrapt zipp
"$python" -m pip install --quiet --no-deps --target="$directory" promise  # published as source alone
du -sh "$directory"
