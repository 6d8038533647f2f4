"""Bytes that autograd keeps of one token in one block, from a model's `config.json`; w are the bytes of a weight."""

from __future__ import annotations

from typing import Any

from forge_ray.train.adapter import experts_of


def saved_per_token(config: dict[str, Any], w: int, on_gpu: bool) -> float:
    """What autograd keeps of one token in one block: inputs of linear layers, of norms (in fp32), of the activation; also
    queries, keys, values and what comes of them, on a CPU in fp32 and with as many heads on all sides (`attention.py`)."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    norms, a = 2 * (2 * 4 * hidden + w * hidden), w if on_gpu else 4
    if config.get("kv_lora_rank"):
        return norms + _latent_attention(config, w, a, heads) + _feed_forward(config, w, hidden)
    queries, keys = heads_of(config)
    attention = a * (2 * queries + 2 * (keys if on_gpu else queries)) + w * queries
    return norms + attention + _feed_forward(config, w, hidden)


def heads_of(config: dict[str, Any]) -> tuple[int, int]:
    """(neurons of all queries, of all keys)."""
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return heads * head, int(config.get("num_key_value_heads") or heads) * head


def _latent_attention(config: dict[str, Any], w: int, a: int, heads: int) -> float:
    """MLA (arXiv:2405.04434): norms of the latents, queries, keys put together, keys and values as expanded."""
    latents = int(config.get("q_lora_rank") or 0) + int(config["kv_lora_rank"])
    nope, rope, value = (int(config[f"{name}_head_dim"]) for name in ("qk_nope", "qk_rope", "v"))
    return (8 + w) * latents + heads * (a * 2 * (nope + rope + value) + w * (nope + value))


def _feed_forward(config: dict[str, Any], w: int, hidden: int) -> float:
    """Four times the neurons that a token passes; for each of its experts a copy of the token before and after."""
    taken, dense = int(config.get("num_experts_per_tok") or 0), int(config["intermediate_size"])
    if not taken or not experts_of(config):
        return w * 4 * dense
    width = int(config.get("moe_intermediate_size") or dense)
    layers, plain = int(config["num_hidden_layers"]), int(config.get("first_k_dense_replace") or 0)
    mixture = 4 * width * (taken + int(config.get("n_shared_experts") or 0)) + 2 * taken * hidden
    return w * (plain * 4 * dense + (layers - plain) * mixture) / layers
