"""Greedy answers of vLLM, one text at a time; `benchmarks.engines` starts this process.

Reads a JSON object from stdin: folder, prompts, drafts, max_new_tokens. Prints one as
its last line: ids, seconds, passes.
"""

import json
import os
import sys
import time

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def counted(llm) -> tuple[float, float]:
    """Drafts verified so far, and tokens of them that were accepted."""
    values = {metric.name: metric for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    drafts, accepted = (getattr(values.get(name), "value", 0) for name in names)
    return drafts, accepted


def main() -> None:
    """Answers all prompts twice, and times the second time."""
    os.environ.update(SETTINGS)
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    how = {"model": job["folder"], "dtype": "float32", "max_model_len": 2048}
    if job["drafts"]:
        import mtp_vllm

        how |= mtp_vllm.arguments(job["folder"])
    llm = LLM(**how, disable_log_stats=False, enable_prefix_caching=False)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_new_tokens"], detokenize=False
    )

    def answers():
        found = []
        for ids in job["prompts"]:
            [made] = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
            found.append(list(made.outputs[0].token_ids))
        return found

    answers()
    before = counted(llm)
    began = time.perf_counter()
    ids = answers()
    seconds = time.perf_counter() - began
    accepted = counted(llm)[1] - before[1]
    passes = sum(map(len, ids)) - accepted
    print(json.dumps({"ids": ids, "seconds": seconds, "passes": passes}))


if __name__ == "__main__":  # processes of vLLM import this file
    main()
