"""The needle model: Llama's architecture, small, written for long sequences of a fixed number of tokens a step.

Everything but attention works on flat [tokens, width], so each compiled piece has one shape whatever the sequence
length is, and is compiled once for all lengths and layers.
"""
import json
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CONFIG = dict(layers=6, width=256, heads=8, kv_heads=2, head_dim=64, mlp=768, vocabulary=2048,
              rope_theta=500000.0, eps=1e-5, positions=17408)


def rms(x, weight, eps=CONFIG["eps"]):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def linear(x, weight):
    return F.linear(x.bfloat16(), weight.bfloat16())


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).bfloat16()


def before_attention(x, norm, wqkv, cos, sin):
    """[N, width] -> q [N, Hq, d], k [N, Hkv, d] after RoPE, v [N, Hkv, d]."""
    c = CONFIG
    y = linear(rms(x, norm), wqkv).view(x.shape[0], c["heads"] + 2 * c["kv_heads"], c["head_dim"])
    q, k, v = y.split((c["heads"], c["kv_heads"], c["kv_heads"]), 1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def after_attention(x, a, wo, norm, wgu, wd):
    x = x + linear(a, wo).float()
    gate, up = linear(rms(x, norm), wgu).chunk(2, -1)
    return x + linear(F.silu(gate) * up, wd).float()


def head_loss(x, norm, embedding, target, weight, is_answer):
    """Weighted loss; and, for the log, the answer and language losses and the answers' accuracy, summed."""
    logits = linear(rms(x, norm), embedding).float()
    each = F.cross_entropy(logits, target, reduction="none")
    right = (logits.argmax(-1) == target).float()
    with torch.no_grad():
        log = torch.stack(((each * is_answer).sum(), (right * is_answer).sum(), is_answer.sum(), each.mean()))
    return (each * weight).sum(), log


class Needle(nn.Module):
    def __init__(self, seed):
        super().__init__()
        c = CONFIG
        g = torch.Generator().manual_seed(seed)

        def matrix(rows, columns, std):
            return nn.Parameter(torch.randn(rows, columns, generator=g) * std)

        inner = 0.5 * c["width"] ** -0.5
        closing = (2 * c["layers"]) ** -0.5
        qo = c["heads"] * c["head_dim"]
        self.embedding = matrix(c["vocabulary"], c["width"], 0.02)
        self.norm = nn.Parameter(torch.ones(c["width"]))
        self.layers = nn.ModuleList()
        for _ in range(c["layers"]):
            layer = nn.ParameterDict(dict(
                norm1=torch.ones(c["width"]), norm2=torch.ones(c["width"]),
                wqkv=matrix(qo + 2 * c["kv_heads"] * c["head_dim"], c["width"], inner),
                wo=matrix(c["width"], qo, 0.5 * qo ** -0.5 * closing),
                wgu=matrix(2 * c["mlp"], c["width"], inner),
                wd=matrix(c["width"], c["mlp"], 0.5 * c["mlp"] ** -0.5 * closing),
            ))
            self.layers.append(layer)
        self.before, self.after, self.head = before_attention, after_attention, head_loss

    def compile(self):
        self.before, self.after, self.head = (torch.compile(f, dynamic=False) for f in (self.before, self.after, self.head))

    def angles(self, positions):
        c = CONFIG
        exponent = torch.arange(0, c["head_dim"], 2, device=positions.device, dtype=torch.float64) / c["head_dim"]
        angle = positions.double()[:, None] * c["rope_theta"] ** -exponent
        return angle.cos().float(), angle.sin().float()

    def loss(self, tokens, target, weight, is_answer, cos, sin, attention):
        """tokens, target, weight, is_answer [B, T]; cos, sin [B * T, d / 2]."""
        b, t = tokens.shape
        x = F.embedding(tokens.reshape(-1), self.embedding)
        for l in self.layers:
            q, k, v = self.before(x, l["norm1"], l["wqkv"], cos, sin)
            q, k, v = (y.view(b, t, y.shape[1], y.shape[2]).transpose(1, 2) for y in (q, k, v))
            a = attention(q, k, v).transpose(1, 2).reshape(b * t, -1)
            x = self.after(x, a, l["wo"], l["norm2"], l["wgu"], l["wd"])
        return self.head(x, self.norm, self.embedding, target.reshape(-1), weight.reshape(-1), is_answer.reshape(-1))

    def export(self, folder):
        from safetensors.torch import save_file

        c = CONFIG
        os.makedirs(folder, exist_ok=True)
        out = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        q, kv = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
        for i, l in enumerate(self.layers):
            wq, wk, wv = l["wqkv"].split((q, kv, kv))
            gate, up = l["wgu"].chunk(2)
            for name, value in {
                "self_attn.q_proj": wq, "self_attn.k_proj": wk, "self_attn.v_proj": wv, "self_attn.o_proj": l["wo"],
                "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": l["wd"],
                "input_layernorm": l["norm1"], "post_attention_layernorm": l["norm2"],
            }.items():
                out[f"model.layers.{i}.{name}.weight"] = value
        out = {name: value.detach().bfloat16().cpu().contiguous().clone() for name, value in out.items()}
        save_file(out, f"{folder}/model.safetensors", metadata={"format": "pt"})
        config = dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=c["width"],
            intermediate_size=c["mlp"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
            num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], vocab_size=c["vocabulary"],
            max_position_embeddings=c["positions"], rope_theta=c["rope_theta"], rope_scaling=None,
            rms_norm_eps=c["eps"], attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True)
        for name, value in (("config.json", config), ("generation_config.json", dict(bos_token_id=0, eos_token_id=1, do_sample=False))):
            with open(f"{folder}/{name}", "w") as f:
                json.dump(value, f, indent=2)
                f.write("\n")


def fastest_attention(b, t):
    """Causal attention by whichever backend runs a forward and backward fastest at this shape on this machine."""
    c = CONFIG
    group = c["heads"] // c["kv_heads"]

    def make(backend, expand):
        def attention(q, k, v):
            if expand:
                k, v = (y.repeat_interleave(group, 1) for y in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand)
        return attention

    best = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        for expand in (False, True):
            attention = make(backend, expand)
            try:
                q, k, v = (torch.randn(b, t, h, c["head_dim"], device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                           .requires_grad_() for h in (c["heads"], c["kv_heads"], c["kv_heads"]))
                ms = float("inf")
                for _ in range(3):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    attention(q, k, v).sum().backward()
                    end.record()
                    torch.cuda.synchronize()
                    ms = min(ms, start.elapsed_time(end))
            except RuntimeError as error:
                print(f"attention {backend} expand={expand}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(f"attention T={t} {backend} expand={expand}: {ms:.2f} ms", flush=True)
            if best is None or ms < best[0]:
                best = (ms, attention)
    if best is None:
        raise RuntimeError("no attention backend works on this machine")
    return best[1]
