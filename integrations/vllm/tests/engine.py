"""Runs jobs in one engine of vLLM, in a process of its own: `python engine.py JOB OUT`.

JOB is a JSON file: `engine`, arguments of LLM; `jobs`, a list of what to run, each with
`prompts` (lists of token ids), `sampling` and, to be caught, `wrong_row`. OUT gets, for
each job, the ids that were written, how many tokens of each prompt came from the cache,
and what the engine counted: drafts, tokens drafted, drafts accepted by position.
"""

import json
import os
import pathlib
import sys

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
NAMES = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted",
}


def counts_of(llm):
    """What the engine counted of its drafts so far."""
    return {
        NAMES[metric.name]: getattr(metric, "values", None) or metric.value
        for metric in llm.get_metrics()
        if metric.name in NAMES
    }


def less(after, before):
    """Counts since some earlier ones."""
    if isinstance(after, list):
        return [a - b for a, b in zip(after, before or [0] * len(after), strict=True)]
    return after - (before or 0)


def take_the_row_before():
    """The error that tests must notice: drafts of the state one token too early."""
    from mtp_vllm.model import LlamaWithHeadsForCausalLM

    right = LlamaWithHeadsForCausalLM.draft

    def wrong(self, row_R, token_R):
        return right(self, (row_R - 1).clamp(min=0), token_R)

    LlamaWithHeadsForCausalLM.draft = wrong


def main():
    os.environ.update(SETTINGS)
    file, out = map(pathlib.Path, sys.argv[1:])
    asked = json.loads(file.read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**asked["engine"])
    results, before = [], {}
    for job in asked["jobs"]:
        if job.get("wrong_row"):
            take_the_row_before()
        sampling = SamplingParams(**{"detokenize": False} | job["sampling"])
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        written = llm.generate(prompts, sampling, use_tqdm=False)
        now = counts_of(llm)
        results.append(
            {
                "ids": [list(x.outputs[0].token_ids) for x in written],
                "cached": [x.num_cached_tokens for x in written],
                **{name: less(value, before.get(name)) for name, value in now.items()},
            }
        )
        before = now
    out.write_text(json.dumps(results))


if __name__ == "__main__":  # processes of vLLM import this file
    main()
