#!/usr/bin/env bash
# Everything that is to be known of one GPU, in one command of at most --minutes.
#
#   benchmarks/gpu.sh --prepare=.whl             # here, with a network: the wheels
#   benchmarks/gpu.sh --wheels=.whl --out=gpu.jsonl --minutes=8     # there, without one
#   benchmarks/gpu.sh --wheels=.whl --only='0\.3b|7b'   # the parts whose words match
#   benchmarks/gpu.sh --rehearse --out=gpu.jsonl # all of it on a CPU, at tiny shapes
#   python -m benchmarks.gpu.tables gpu.jsonl    # the tables of docs/performance.md
#
# Every part is a process of its own and appends a line of JSON for each result at once,
# so a command that is cut off keeps what it had. Parts come in the order of their value.
set -uo pipefail

python=${PYTHON:-python3} out=gpu.jsonl minutes=8 wheels='' rehearse='' prepare='' only=''
for argument; do
    case $argument in
        --out=*) out=${argument#*=} ;;
        --minutes=*) minutes=${argument#*=} ;;
        --wheels=*) wheels=${argument#*=} ;;
        --only=*) only=${argument#*=} ;;
        --prepare=*) prepare=${argument#*=} ;;
        --rehearse) rehearse=--rehearse ;;
        *) echo "gpu.sh: unknown option $argument; the head of this file has them" >&2
           exit 2 ;;
    esac
done

out=$(realpath -m "$out")
[ -z "$wheels" ] || wheels=$(realpath "$wheels") || exit 2
[ -z "$prepare" ] || prepare=$(realpath -m "$prepare")
cd "$(dirname "$0")/.." || exit

# What an image with jax, flax, optax, orbax, torch and transformers lacks.
packages=(ml-collections==1.1.0 tensorboardX==2.6.5 grain==0.2.18 array-record==0.8.6)
if [ -n "$prepare" ]; then
    platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
    exec "$python" -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" \
        --dest "$prepare" "${packages[@]}"
fi

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
if [ -n "$rehearse" ]; then
    # Nothing is timed for its own sake: programs that compile fast.
    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0
    untuned=$XLA_FLAGS
else
    # Equality asks for no speed: products as the library has them, none tried out.
    untuned="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    # Parts share the device with torch, one after another: no process takes it whole.
    export XLA_PYTHON_CLIENT_MEM_FRACTION=.92
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
fi

end=$((SECONDS + minutes * 60)) failed=0
part() { # NAME ARGUMENTS...: runs a part in the time that is left
    local left=$((end - SECONDS)) code=0
    [[ -z "$only" || "$*" =~ $only ]] || return
    if [ "$left" -lt 10 ]; then
        echo "gpu.sh: no time for $*" >&2
        return
    fi
    timeout --signal=INT --kill-after=10 "$left" \
        "$python" -m "benchmarks.gpu.$1" --out="$out" $rehearse "${@:2}" || code=$?
    if [ "$code" -ne 0 ]; then
        failed=$((failed + 1))
        echo "gpu.sh: $* ended with $code" >&2
    fi
}

XLA_FLAGS=$untuned part equality
part training --case=1.3b,4,fused
part training --case=1.3b,1,fused
part torch_training --shape=1.3b
part profile --case=1.3b,4,fused
part decoding --shape=1.3b --batches=1,16
part torch_decoding --shape=1.3b
part training --case=1.3b,4,fused --scan_layers=yes
part training --case=1.3b,8,fused --scan_layers=yes
part training --case=0.3b,4,fused
part training --case=0.3b,1,fused
part torch_training --shape=0.3b
part decoding --shape=1.3b --batches=4,64
part training --case=1.3b,4,remat
part training --case=1.3b,4,naive
part decoding --shape=7b --batches=1,4,16,64
part vllm_decoding --shape=1.3b
echo "gpu.sh: $(wc -l <"$out") results in $out, $failed parts failed" >&2
[ "$failed" -eq 0 ]
