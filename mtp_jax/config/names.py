"""Names of fields that people look for, and where they are."""

import difflib

from mtp_jax.config.section_tree import as_tree
from mtp_jax.config.sections import Config

# Names of other trainers, and of this one's own prose, by the fields that they mean.
_MEANINGS = {
    "optim.peak_lr": "lr learning_rate max_lr base_lr step_size",
    "optim.decay_ratio": "min_lr final_lr min_lr_ratio lr_min end_lr",
    "optim.warmup_steps": "warmup lr_warmup_steps num_warmup_steps warmup_iters",
    "optim.b1": "beta1 adam_beta1",
    "optim.b2": "beta2 adam_beta2",
    "optim.eps": "adam_eps epsilon adam_epsilon",
    "optim.weight_decay": "wd decay",
    "optim.clip_norm": "clip grad_clip gradient_clip max_grad_norm clip_grad_norm",
    "train.steps": "max_steps num_steps total_steps iterations max_iters n_steps",
    "train.accumulation": "grad_accum gradient_accumulation accumulation_steps "
    "gradient_accumulation_steps microbatches num_microbatches",
    "train.compilation_cache": "cache cache_dir compile_cache",
    "data.batch_size": "batch bs global_batch_size train_batch_size",
    "data.seq_len": "sequence_length seq_length context block_size context_length "
    "max_seq_len max_length ctx_len window",
    "data.sources": "source corpus corpora dataset datasets data_dir path paths",
    "data.weights": "mixture mix proportions sampling_weights",
    "data.workers": "num_workers readers",
    "model.d_model": "width hidden hidden_size dim n_embd embed_dim d_embed emb_dim",
    "model.num_layers": "layers n_layers n_layer depth num_hidden_layers",
    "model.n_future_tokens": "n heads n_heads num_heads n_head prediction_heads "
    "num_prediction_heads future_tokens n_pred mtp_heads",
    "model.num_query_heads": "heads n_heads num_heads n_head attention_heads "
    "num_attention_heads q_heads",
    "model.num_kv_heads": "kv_heads n_kv_heads num_key_value_heads",
    "model.d_head": "head_dim head_size dim_head",
    "model.d_ff": "ffn_dim intermediate_size mlp_dim hidden_dim ff ffn_hidden_size",
    "model.vocab_size": "vocab n_vocab vocabulary vocabulary_size",
    "model.rope_theta": "rope_base theta rotary_base",
    "model.norm_eps": "rms_norm_eps layer_norm_eps",
    "model.tie_embeddings": "tie tied tie_word_embeddings tie_weights",
    "model.param_dtype": "dtype precision weight_dtype",
    "model.compute_dtype": "dtype precision activation_dtype bf16 amp",
    "compute.remat": "checkpointing gradient_checkpointing activation_checkpointing "
    "recompute rematerialize",
    "compute.scan_layers": "scan unroll unroll_layers scan_blocks",
    "compute.attention": "flash attn kernel flash_attention attention_kernel",
    "compute.chunk_tokens": "chunk chunk_size logits_chunk",
    "mesh.replica": "dp data_parallel replicas ddp",
    "mesh.fsdp": "zero shard sharded",
    "mesh.vocab": "vocab_parallel parallel_vocab",
    "mesh.tensor": "tp tensor_parallel model_parallel",
    "mesh.sequence": "sp cp context_parallel sequence_parallel",
    "checkpoint.every": "save_every save_interval checkpoint_every save_steps "
    "checkpoint_interval ckpt_every",
    "checkpoint.keep_latest": "keep max_to_keep save_total_limit",
    "eval.every": "eval_every eval_interval eval_steps evaluate_every",
    "eval.batches": "eval_batches eval_iters",
    "log.every": "log_every log_interval logging_steps print_every",
    "loss.head_weights": "loss_weights",
    "heads.kind": "head_kind head_type mtp_kind mtp_type",
    "heads.layers": "head_layers layers_per_head mtp_layers",
    "heads.shared": "share_heads repeated mtp_use_repeated_layer",
    "heads.unembedding": "own_unembedding lm_heads replicated_unembedding",
    "heads.markov_rank": "bias_rank bigram_rank",
    "layer.qkv_bias": "attention_bias bias attn_bias qkv_proj_bias",
    "layer.qk_norm": "use_qk_norm qk_layernorm query_key_norm",
    "layer.norms": "norm_placement post_norm pre_norm",
    "layer.windows": "sliding_window attention_window local_attention",
    "rope.scaling": "rope_type rope_scaling yarn",
    "rope.factor": "rope_factor scaling_factor",
    "rope.context": "max_position_embeddings context_window",
    "rope.original_context": "original_max_position_embeddings",
    "loss.z_loss": "zloss z_loss_weight",
    "loss.kind": "loss_type objective distillation distill",
    "loss.label_smoothing": "smoothing label_smooth",
    "loss.schedule": "loss_schedule head_schedule curriculum weight_schedule",
    "loss.trunk_gradient": "detach detach_heads mtp_detach_heads head_gradient",
    "optim.rates": "lr_multipliers head_lr lr_mult param_groups heads_lr",
    "optim.lora_rank": "lora lora_r lora_dim",
    "init.workdir": "init_from pretrained finetune_from load_from base_model",
    "optim.frozen": "freeze freeze_trunk frozen_layers",
}


def fields_meant(name: str, section: str = "") -> list[str]:
    """Fields that a name that is no field may mean, as `config.optim.peak_lr`.

    A field of this name elsewhere comes first, then what other trainers call so, then
    names that are spelt alike, those of `section` before others.
    """
    sections = as_tree(Config())
    there = [f"{part}.{field}" for part, fields in sections.items() for field in fields]
    plain = name.lower().replace("-", "_")
    found = [path for path in there if path.endswith(f".{plain}")]
    found = found or [
        path for path in there if plain in _MEANINGS.get(path, "").split()
    ]
    if not found:
        near = [path for path in there if path.startswith(f"{section}.")]
        found = _spelt_alike(plain, near) or _spelt_alike(plain, there)
    if not section and (alike := difflib.get_close_matches(plain, sections, 1)):
        found = alike
    return [f"config.{path}" for path in found]


def did_you_mean(name: str, section: str = "", before: str = "") -> str:
    """A part of a line, as `; did you mean config.optim.peak_lr?`, or a full stop."""
    meant = [before + path for path in fields_meant(name, section)]
    return f"; did you mean {' or '.join(meant)}?" if meant else "."


def _spelt_alike(name: str, paths: list[str]) -> list[str]:
    last = {path.partition(".")[2]: path for path in paths}
    return [last[x] for x in difflib.get_close_matches(name, last, 1, 0.75)]
