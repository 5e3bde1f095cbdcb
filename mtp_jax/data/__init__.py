"""From text to shards to rows to batches; tokenizers."""
