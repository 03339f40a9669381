#!/usr/bin/env python3
"""What others take at the shape of the speed table, on this card: python3 bench/speed/peers.py > peers.csv

Llama-3.1-8B from its configuration with random weights (nothing is downloaded), bf16, batch 1: transformers with the cache on the GPU and
offloaded, torch's attention of one decoded token over a full cache, and the rate of a large matrix product. Each line is written when it
is measured: name, unit, then the median, the quartiles, the least and the most of its samples.
"""
import statistics
import sys
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PROMPT = 32 * 1024
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def tell(name, unit, samples):
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    print(",".join([name, unit] + [f"{x:.6g}" for x in (middle, low, high, min(samples), max(samples))]), flush=True)


def device_ms(work, samples, inner=1):
    """Milliseconds of `work`, from events around `inner` of it."""
    for _ in range(2):
        work()
    taken = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / inner)
    return taken


def matmul():
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tell("torch bf16 matmul", "TFLOP/s", [2 * n**3 / ms / 1e9 for ms in device_ms(lambda: a @ b, 20)])


def attention(tokens):
    """One token's attention over everything, in one layer; caches take turns so that none is in L2."""
    caches = [torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(1, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    turn = 0

    def work():
        nonlocal turn
        k, v = caches[turn := (turn + 1) % 2]
        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    tell(f"torch SDPA: decode attention of one layer over {tokens // 1024}K", "us", [1e3 * ms for ms in device_ms(work, 50, 4)])


def model():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval(), config


@torch.inference_mode()
def decode(made, cache, name, steps, prompt=None):
    ids = torch.randint(0, 128256, (1, PROMPT), device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    made(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    torch.cuda.synchronize()
    if prompt:
        tell(prompt, "ms", [1e3 * (time.perf_counter() - began)])
    token = ids[:, -1:]
    taken = []
    for step in range(steps + 2):
        began = time.perf_counter()
        made(input_ids=token, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        if step >= 2:
            taken.append(1e3 * (time.perf_counter() - began))
    tell(name, "ms", taken)


def main():
    torch.manual_seed(1)
    print("name,unit,median,p25,p75,least,most", flush=True)
    matmul()
    attention(PROMPT)
    attention(4 * PROMPT)
    made, config = model()
    with torch.inference_mode():  # what a first call compiles and allocates is not measured
        made(input_ids=torch.randint(0, 128256, (1, PROMPT), device="cuda"), use_cache=False, logits_to_keep=1)
    decode(made, DynamicCache(config=config), "transformers 32K: cache on the GPU", 40, "transformers 32K: prompt")
    torch.cuda.empty_cache()
    decode(made, DynamicCache(config=config, offloading=True), "transformers 32K: cache offloaded", 12)


if __name__ == "__main__":
    sys.exit(main())
