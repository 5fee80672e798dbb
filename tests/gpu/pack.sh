#!/usr/bin/env bash
# What a GPU machine without a network lacks, as wheels for its Python in build/gpu-pack, and the commands to run there.
#
#   bash tests/gpu/pack.sh                             # or make gpu-pack
#   GPU_PYTHON=3.12 GPU_CUDA=130 bash tests/gpu/pack.sh openai   # its Python and CUDA; more packages
#
# For a machine that has torch, Triton, transformers, peft, accelerate, safetensors, numpy, huggingface-hub, jinja2, pytest
# and hypothesis already. Needs pip, a package index and no GPU here. build/ is ignored by git: copy build/gpu-pack with the
# tree.
set -euo pipefail
cd "$(dirname "$0")/../.."
GPU_PYTHON=${GPU_PYTHON:-3.12}
GPU_CUDA=${GPU_CUDA:-130}
PACK=build/gpu-pack
PY=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || command -v python3)}
rm -rf "$PACK" && mkdir -p "$PACK"

NAMES="bitsandbytes gguf google-re2 fastapi starlette uvicorn pydantic pydantic_core annotated-types annotated-doc
  typing-inspection liger-kernel llguidance opentelemetry-api prometheus_client $*"
PLATFORMS=$(for n in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do echo --platform manylinux_${n}_x86_64; done)
for name in $NAMES; do
  pin=$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt | sed -E 's/[ ;].*//' | head -1 || true)
  # shellcheck disable=SC2086
  "$PY" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$GPU_PYTHON" \
    --implementation cp --abi "cp${GPU_PYTHON/./}" --abi abi3 --abi none $PLATFORMS --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 -d "$PACK" "${pin:-$name}" 2> >(grep -v 'is ignored: it is neither' >&2)
done

# bitsandbytes brings a library for every CUDA and ROCm, 43 MB, of which that machine loads one.
"$PY" - "$PACK" "$GPU_CUDA" <<'PYTHON'
import pathlib, re, sys, zipfile
folder, cuda = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("bitsandbytes-*.whl")
trimmed = wheel.with_suffix(".new")
drop = re.compile(rf"bitsandbytes/libbitsandbytes_(?!cuda{cuda}\.so|cpu\.so)")
with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(trimmed, "w", zipfile.ZIP_DEFLATED) as new:
    if f"bitsandbytes/libbitsandbytes_cuda{cuda}.so" not in old.namelist():
        sys.exit(f"{wheel.name} has no library for CUDA {cuda}: give GPU_CUDA")
    for entry in old.infolist():
        if drop.match(entry.filename):
            continue
        data = old.read(entry)
        if entry.filename.endswith(".dist-info/RECORD"):
            data = b"".join(line for line in data.splitlines(True) if not drop.match(line.decode()))
        new.writestr(entry, data)
trimmed.replace(wheel)
PYTHON

# The project itself, for its version; the tree's own code comes first.
"$PY" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$PACK" . 2>/dev/null ||
  "$PY" -m pip wheel -q --disable-pip-version-check --no-deps -w "$PACK" .
rm -rf build/lib build/bdist.*

ls -l "$PACK" | awk 'NR > 1 {printf "%9d  %s\n", $5, $9}'
du -cb "$PACK"/*.whl | tail -1 | awk '{printf "%.1f MB of wheels, for Python '"$GPU_PYTHON"' and CUDA '"$GPU_CUDA"'\n", $1 / 1e6}'
cat <<END

There, in the tree with build/gpu-pack:
  python3 -m pip install -q --no-index --no-deps --target build/gpu-site build/gpu-pack/*.whl
  export PYTHONPATH=\$PWD/build/gpu-site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=\$PWD/build/triton
  python3 -m tests.gpu.check                       # at most 9 minutes, as each of these
  python3 -m benchmarks.serve_gpu --only qwen3-4b-r32 --seconds 240 --minutes 9 --out serve.json
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 -m benchmarks.train_gpu --only llama-8b --seconds 200 --minutes 9 --out train.json
END
