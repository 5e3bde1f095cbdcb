"""From prompts to continuations: generator, batches, compiled programs, KV cache."""
