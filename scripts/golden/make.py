"""Make test/fixtures/golden: tiny random checkpoints and the log-probabilities that transformers gives for them.

    python3 scripts/golden/make.py --out test/fixtures/golden

Needs torch, transformers 5.17 and numpy; a CPU is enough (seconds). Each variant is a Hugging Face folder as save_pretrained
writes it, plus golden.json {transformers, torch, tokens, positions, vocab, rope: {invFreq, scale}, float32Difference} and
logprobs.bin, float32 [positions][vocab] little endian. Row p is log P(token p + 1 | tokens 0..p).

transformers computes RMSNorm, rotary angles and softmax in float32 whatever the model's dtype. Here the name torch.float32
stands for float64 while it runs, so that its own code gives values that a float64 reference must meet closely;
float32Difference says how far its ordinary float32 run is from them.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import traceback

import numpy
import torch
import transformers

N_TOKENS = 80
COMMON = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


# head_dim 16 != 48 / 4: read where given. theta 500 and short original contexts: every branch of a scaling is taken.
VARIANTS = {
    "llama": {
        "config": "LlamaConfig", "dtype": torch.float32, "spelling": "new",
        "options": {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": plain(10000.0)},
    },
    "llama3-rope": {
        "config": "LlamaConfig", "dtype": torch.float32, "spelling": "rope_type",
        "options": {
            "head_dim": 16, "tie_word_embeddings": False, "eos_token_id": [2, 5],
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
    },
    "qwen2": {
        "config": "Qwen2Config", "dtype": torch.float32, "spelling": "new",
        "options": {
            "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True,
            "rope_parameters": plain(1000000.0),
        },
    },
    "qwen3": {
        "config": "Qwen3Config", "dtype": torch.float32, "spelling": "new",
        "options": {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": plain(1000000.0)},
    },
    "yarn": {
        "config": "LlamaConfig", "dtype": torch.float32, "spelling": "new",
        "options": {
            "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    },
    "linear-bf16": {
        "config": "MistralConfig", "dtype": torch.bfloat16, "spelling": "type",
        "options": {
            "head_dim": 16, "tie_word_embeddings": True, "sliding_window": None,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
}


@contextlib.contextmanager
def float64_for_float32():
    """Within, what asks torch for float32 gets float64."""
    kept = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float, default = kept
        torch.set_default_dtype(default)


def randomize(model, seed):
    """Weights whose logits are neither flat nor one-hot, with norms and biases that matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter, mean, std):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                normal(parameter, 1.0, 0.2)
            elif name.endswith(".bias"):
                normal(parameter, 0.0, 0.3)
            elif "embed_tokens" in name:
                normal(parameter, 0.0, 0.5)
            else:
                normal(parameter, 0.0, 1.4 / parameter.shape[1] ** 0.5)


def logprobs(model, tokens):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return torch.log_softmax(logits, dim=-1)


def older_spelling(folder, key):
    """Rewrites config.json as transformers before version 5 wrote it; `key` names the rope type: "rope_type" or "type"."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {key: rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(folder, variant, seed):
    config_class = getattr(transformers, variant["config"])
    config = config_class(**{**COMMON, **variant["options"]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model, seed)
    model = model.to(variant["dtype"])
    model.save_pretrained(folder)

    generator = torch.Generator().manual_seed(seed + 1000)
    tokens = torch.randint(3, config.vocab_size, (N_TOKENS,), generator=generator).tolist()
    rotary = type(model.model.rotary_emb)
    model = model.float()
    model.model.rotary_emb = rotary(config)
    ordinary = logprobs(model, tokens)
    with float64_for_float32():
        model = model.double()
        model.model.rotary_emb = rotary(config)
        golden = logprobs(model, tokens)
    if golden.dtype != torch.float64 or model.model.rotary_emb.inv_freq.dtype != torch.float64:
        raise RuntimeError("something computed in less than float64")
    difference = (golden - ordinary.double()).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(f"float64 and float32 runs differ by {difference}")

    golden.float().numpy().astype("<f4").tofile(folder / "logprobs.bin")
    record = {
        "transformers": transformers.__version__, "torch": torch.__version__, "tokens": tokens,
        "positions": N_TOKENS, "vocab": config.vocab_size, "float32Difference": difference,
        "rope": {
            "invFreq": model.model.rotary_emb.inv_freq.tolist(),
            "scale": float(model.model.rotary_emb.attention_scaling),
        },
    }
    (folder / "golden.json").write_text(json.dumps(record) + "\n")
    if variant["spelling"] != "new":
        older_spelling(folder, variant["spelling"])
    best = golden.max(dim=-1).values
    return difference, best.mean().item(), len(set(golden.argmax(dim=-1).tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write the variants' folders to")
    out = parser.parse_args().out
    failed = []
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            difference, best, distinct = make(folder, variant, seed)
            print(f"{name}: float32 differs by {difference:.1e}; best logprob {best:.2f} on average, {distinct} argmaxes")
        except Exception:
            failed.append(name)
            traceback.print_exc()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.2f} MB; numpy {numpy.__version__}; failed: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
