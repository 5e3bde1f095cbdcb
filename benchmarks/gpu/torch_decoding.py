"""Plain greedy decoding of the same shape in transformers, bfloat16, random weights.

python -m benchmarks.gpu.torch_decoding --shape=1.3b
"""

import sys

from benchmarks.gpu.results import Results, installed, median_s, parsed, shape
from benchmarks.timing import script
from mtp_jax.interop.hf_llama import new_llama

_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_ROUNDS = 3


@script
def main(argv: list[str]) -> int:
    """Adds a result for each batch size, or says why there is none."""
    args = parsed(argv, "Plain decoding in torch.", shape="1.3b", batches="1,16")
    if not installed("torch", "transformers"):
        Results(args.out, args.rehearse, "none").add(
            "torch_decoding",
            shape=args.shape,
            error="torch or transformers is not installed",
        )
        return 0
    import torch

    gpu = torch.cuda.is_available()
    results = Results(
        args.out, args.rehearse, torch.cuda.get_device_name() if gpu else "cpu"
    )
    device = "cuda" if gpu else "cpu"
    cfg = shape(args.shape, 1, args.rehearse).model
    new = 4 if args.rehearse else _NEW_TOKENS
    model = new_llama(cfg, _PROMPT_TOKENS + new, attn_implementation="sdpa")
    model = model.to(device, torch.bfloat16).eval()
    for size in [1] if args.rehearse else [int(x) for x in args.batches.split(",")]:
        case = {"shape": args.shape, "batch": size}
        with results.failures_told("torch_decoding", **case):
            prompt = torch.arange(_PROMPT_TOKENS, device=device) % 200
            prompts = prompt.repeat(size, 1)

            def write(prompts=prompts) -> None:
                with torch.inference_mode():
                    made = model.generate(
                        prompts,
                        attention_mask=torch.ones_like(prompts),
                        do_sample=False,
                        min_new_tokens=new,
                        max_new_tokens=new,
                        pad_token_id=0,
                    )
                made.cpu()

            seconds = median_s(write, _ROUNDS, warm=1)
            results.add("torch_decoding", **case, tokens_per_s=size * new / seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
