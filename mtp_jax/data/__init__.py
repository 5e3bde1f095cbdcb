"""Data: text to shards, shards to rows, rows to batches; tokenizers and prompts."""
