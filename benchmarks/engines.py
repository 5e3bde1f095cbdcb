"""One model in several programs: tokens a forward pass, speed, and where texts part.

Greedy answers to the questions of a .jsonl file, one text at a time, in float32, with
as many threads as this process may use cores. This package on --workdir, plain and with
each --decoder (as `verify` names them) that uses the first so many --heads (0: all;
several numbers, a row each); the folder that `export` wrote, --hf, in transformers,
plain and drafting with itself; head 1 as --gguf in llama.cpp (package xllamacpp); and
--hf in vLLM, plain and drafting, with --vllm=PYTHON, the interpreter of an environment
that has it and `mtp-vllm`. What is not given or not installed is left out.

Every program answers all questions once, untimed; then they take turns, question by
question. vLLM, in a process of its own, does both after them. Where a text is not
plain's, the first token that differs is told, and by how much the logits of the two
tokens differ there: rounding explains a gap of 1e-3 or less.

python -m benchmarks.engines --workdir=runs/smollm2/heads --hf=runs/smollm2/hf \
    --gguf=runs/smollm2/gguf/model.gguf --questions=runs/smollm2/heldout.jsonl
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.timing import options, print_environment, print_table, script
from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.cli.decoder_args import decoder_of
from mtp_jax.data.prompts import read_questions
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.prompt_list import WholePrompt
from mtp_jax.decode.questions import questions_of
from mtp_jax.errors import UserError
from mtp_jax.eval.outputs import head_outputs

# Ids of an answer without the end of text, and forward passes, if they are known.
Answer = tuple[list[int], int | None]
Program = Callable[[list[int]], Answer]


@script
def main(argv: list[str]) -> int:
    """Prints a row a program, and a line for each text that parts."""
    args = options(
        argv,
        "Speed and texts of one model in several programs.",
        workdir="",
        hf="",
        gguf="",
        vllm="",
        questions="",
        decoder=["blockwise"],
        heads=[0],
        max_new_tokens=128,
        rounds=1,
    )
    if not args.workdir or not args.questions:
        raise UserError("give --workdir=D and --questions=FILE.")
    if args.vllm and not args.hf:
        raise UserError("--vllm answers from the folder of --hf; give both.")
    print_environment(args.rounds)
    model = restore_model(args.workdir)
    asked = questions_of(read_questions(args.questions), model.tokenizer)
    prompts = [[int(i) for i in question.prompt.ids] for question in asked]
    programs = _programs(model, args)
    found = _in_turn(programs, prompts, args.rounds)
    if args.vllm:
        found |= _vllm(args, prompts, model.tokenizer.end_ids)
    _print(found, model, prompts, args.max_new_tokens)
    return 0


def _programs(model: Restored, args: Any) -> dict[str, Program]:
    """What can be run in this process, by name; `plain` of this package is first."""
    new, ends = args.max_new_tokens, model.tokenizer.end_ids
    plain = Generator.from_restored(model.needed_for_one())
    programs = {"plain": _ours(plain, "plain", new)}
    for count in args.heads:
        k = count or model.config.model.n_future_tokens
        generator = Generator.from_checkpoint(args.workdir, heads=k)
        for name in args.decoder:
            programs[f"{name}, {k} heads"] = _ours(generator, name, new)
    if args.hf and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        programs["transformers"] = _transformers(args.hf, new, ends, False)
        programs["transformers, use_mtp"] = _transformers(args.hf, new, ends, True)
    if args.gguf and importlib.util.find_spec("xllamacpp"):
        programs["llama.cpp"] = _llama_cpp(args.gguf, new, ends)
    return programs


def _ours(generator: Generator, name: str, new: int) -> Program:
    decoder = decoder_of(name)

    def answer(ids: list[int]) -> Answer:
        prompt = WholePrompt(np.array(ids, np.int32))
        [made] = generator.generate([prompt], decoder=decoder, max_new_tokens=new)
        return made.tokens, made.forwards

    return answer


def _transformers(folder: str, new: int, ends: Any, drafts: bool) -> Program:
    import torch
    import transformers

    torch.set_num_threads(_threads())
    llama = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=drafts
    )
    more = {"use_mtp": True} if drafts else {}
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    # The layers run once a pass, however the model is called.
    llama.model.layers[0].register_forward_pre_hook(count)

    def answer(ids: list[int]) -> Answer:
        calls[0] = 0
        row = torch.tensor([ids])
        with torch.inference_mode():
            made = llama.generate(
                row,
                attention_mask=torch.ones_like(row),
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=0,
                **more,
            )
        return _until_end(made[0, len(ids) :].tolist(), ends), calls[0]

    return answer


def _llama_cpp(path: str, new: int, ends: Any) -> Program:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _threads()
    params.warmup, params.verbosity = False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def answer(ids: list[int]) -> Answer:
        asked = {"prompt": ids, "temperature": 0, "n_predict": new}
        asked |= {"max_tokens": new, "cache_prompt": False, "logprobs": 1}
        made = server.handle_completions(asked)
        made = json.loads(made) if isinstance(made, str | bytes) else made
        tokens = made["choices"][0]["logprobs"]["content"]
        return _until_end([token["id"] for token in tokens], ends), None

    return answer


def _vllm(
    args: Any, prompts: list[list[int]], ends: Any
) -> dict[str, tuple[float, list[Answer]]]:
    """Seconds and answers of vLLM, plain and drafting, each in a process."""
    found: dict[str, tuple[float, list[Answer]]] = {}
    threads = str(_threads())
    for name, drafts in (("vLLM", False), ("vLLM, mtp-vllm", True)):
        job = {"folder": args.hf, "prompts": prompts, "drafts": drafts}
        job |= {"max_new_tokens": args.max_new_tokens}
        done = subprocess.run(
            [args.vllm, str(pathlib.Path(__file__).with_name("engines_vllm.py"))],
            input=json.dumps(job),
            env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"vLLM failed:\n{done.stderr[-2000:]}")
        made = json.loads(done.stdout.splitlines()[-1])
        answers: list[Answer] = [(_until_end(x, ends), None) for x in made["ids"]]
        answers[0] = (answers[0][0], made["passes"])
        found[name] = (made["seconds"], answers)
    return found


def _in_turn(
    programs: dict[str, Program], prompts: list[list[int]], rounds: int
) -> dict[str, tuple[float, list[Answer]]]:
    """Seconds of all questions and rounds, and the answers, of each program."""
    for program in programs.values():
        for ids in prompts:  # lengths may need programs of their own
            program(ids)
    seconds = dict.fromkeys(programs, 0.0)
    answers: dict[str, list[Answer]] = {name: [] for name in programs}
    for turn in range(rounds):
        for ids in prompts:
            for name, program in programs.items():
                began = time.perf_counter()
                answer = program(ids)
                seconds[name] += time.perf_counter() - began
                if turn == 0:
                    answers[name].append(answer)
    return {name: (seconds[name] / rounds, answers[name]) for name in programs}


def _print(
    found: dict[str, tuple[float, list[Answer]]],
    model: Restored,
    prompts: list[list[int]],
    new: int,
) -> None:
    def count(answers: list[Answer]) -> int:  # with the ends of texts
        return sum(min(len(ids) + 1, new) for ids, _ in answers)

    expected = [ids for ids, _ in found["plain"][1]]
    plain_s = found["plain"][0] / count(found["plain"][1])
    rows: list[Sequence[object]] = [
        ("", "tokens/s", "to plain", "tokens a pass", "same texts")
    ]
    parted = []
    for name, (seconds, answers) in found.items():
        made = count(answers)
        passes = sum(n or 0 for _, n in answers)
        same = [ids == of for (ids, _), of in zip(answers, expected, strict=True)]
        each = f"{made / passes:.2f}" if passes else ""
        speed = plain_s * made / seconds
        rows.append((name, f"{made / seconds:.1f}", f"{speed:.2f}", each,
                     f"{sum(same)}/{len(same)}"))  # fmt: skip
        for i, equal in enumerate(same):
            if not equal:
                parted.append((name, i, answers[i][0]))
    print_table(*rows)
    for name, i, ids in parted:
        print(
            f"{name}, question {i + 1}: {_parting(model, prompts[i], expected[i], ids)}"
        )


def _parting(
    model: Restored, prompt: list[int], expected: list[int], ids: list[int]
) -> str:
    """Where a text parts from plain's, and by how much the logits differ there."""
    pairs = zip(expected, ids, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return f"ends after {len(ids)} tokens, plain after {len(expected)}"
    row = np.array([[*prompt, *expected[:at]]], np.int32)
    logits_V = np.asarray(head_outputs(model, row).logits_NBTV)[0, 0, -1]
    gap = float(logits_V[expected[at]] - logits_V[ids[at]])
    return f"parts at token {at + 1}, where the logits are {gap:.1e} apart"


def _until_end(ids: Sequence[int], ends: Any) -> list[int]:
    """Ids before the first that ends a text."""
    found = []
    for i in ids:
        if i in ends:
            break
        found.append(int(i))
    return found


def _threads() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
