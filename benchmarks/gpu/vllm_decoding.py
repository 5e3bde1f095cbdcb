"""Plain greedy decoding of the same shape in vLLM, where it is installed.

python -m benchmarks.gpu.vllm_decoding --shape=1.3b
"""

import sys
import tempfile

from benchmarks.gpu.results import Results, installed, median_s, parsed, shape
from benchmarks.timing import script
from mtp_jax.interop.hf_llama import new_llama

_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_ROUNDS = 3


@script
def main(argv: list[str]) -> int:
    """Adds a result for each batch size, or says why there is none."""
    args = parsed(argv, "Plain decoding in vLLM.", shape="1.3b", batches="1,16")
    results = Results(args.out, args.rehearse, "gpu")
    if args.rehearse or not installed("vllm", "torch"):
        why = "vLLM is not installed" if not args.rehearse else "vLLM is not rehearsed"
        results.add("vllm_decoding", shape=args.shape, error=why)
        return 0
    with results.failures_told("vllm_decoding", shape=args.shape):
        import torch
        import vllm

        positions = _PROMPT_TOKENS + _NEW_TOKENS
        cfg = shape(args.shape, 1, False).model
        with tempfile.TemporaryDirectory() as folder:
            new_llama(cfg, positions).to(torch.bfloat16).save_pretrained(folder)
            engine = vllm.LLM(
                folder,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=positions,
            )
            settings = vllm.SamplingParams(
                temperature=0.0,
                max_tokens=_NEW_TOKENS,
                ignore_eos=True,
                detokenize=False,
            )
            ids = [i % 200 for i in range(_PROMPT_TOKENS)]
            for size in (int(x) for x in args.batches.split(",")):
                prompts = [{"prompt_token_ids": ids}] * size

                def write(prompts=prompts) -> None:
                    engine.generate(prompts, settings, use_tqdm=False)

                seconds = median_s(write, _ROUNDS, warm=1)
                results.add(
                    "vllm_decoding",
                    shape=args.shape,
                    batch=size,
                    tokens_per_s=size * _NEW_TOKENS / seconds,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
