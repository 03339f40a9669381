"""Answers questions about long books: with full attention, and with the page selections that the engine makes.

Each question stands alone after the book, as in the demo. Answers are teacher-forced: all tokens being the argmax is
the same as greedy decoding being right. The selection is simulated with the engine's definitions (Quest min/max
digests after RoPE, softmax over candidates, mean over the head group, sink, window), for the question's tokens too.
"""
import json

import torch
import torch.nn.functional as F

from model import CONFIG, after_attention, before_attention, linear, rms

PAGE = 32
HEADS, KV, D = CONFIG["heads"], CONFIG["kv_heads"], CONFIG["head_dim"]


def load(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def prefill(model, tokens):
    """K and V of every layer, [Hkv, N, d]."""
    n = len(tokens)
    cos, sin = model.angles(torch.arange(n, device="cuda"))
    x = F.embedding(torch.tensor(tokens, device="cuda"), model.embedding)
    cache = []
    for l in model.layers:
        q, k, v = (y.transpose(0, 1) for y in before_attention(x, l["norm1"], l["wqkv"], cos, sin))
        a = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        x = after_attention(x, a.transpose(0, 1).reshape(n, -1), l["wo"], l["norm2"], l["wgu"], l["wd"])
        cache.append((k, v))
    return cache


def select(q, k, n, policy):
    """Which of the book's n cached tokens each chunk row attends: [B, Hkv, Lq, n] of bool."""
    b, _, lq, _ = q.shape
    total = torch.arange(lq, device="cuda") + n + 1
    opens = total // PAGE * PAGE - policy["window"]
    at = torch.arange(n, device="cuda")
    seen = (at < policy["sink"]) | (at >= opens[:, None])
    seen = seen.expand(b, KV, lq, n)
    if policy["pages"] == 0:
        return seen
    pages = n // PAGE
    whole = k[:, : pages * PAGE].float().view(KV, 1, pages, PAGE, D)
    low, high = whole.amin(3), whole.amax(3)
    grouped = q.float().view(b, KV, HEADS // KV, lq, D)
    score = (grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT) * D ** -0.5
    page = torch.arange(pages, device="cuda")
    candidate = (page * PAGE >= policy["sink"]) & ((page + 1) * PAGE <= opens[:, None])

    def top(s):
        s = s.masked_fill(~candidate, float("-inf")).softmax(-1).mean(2).masked_fill(~candidate, -1.0)
        best = s.topk(min(policy["pages"], pages), -1).indices
        return torch.zeros_like(s, dtype=torch.bool).scatter_(-1, best, True) & candidate

    chosen = top(score)
    if "tau" in policy:
        earlier = torch.cat((grouped[:, :, :, :1], grouped[:, :, :, :-1]), 3)
        kept = F.cosine_similarity(grouped, earlier, -1).mean(2) >= policy["tau"]
        stale = top(torch.cat((score[:, :, :, :1], score[:, :, :, :-1]), 3))
        policy["flags"] = policy.get("flags", 0) + (~kept).float().mean().item()
        policy["layers"] = policy.get("layers", 0) + 1
        chosen = torch.where(kept[..., None], stale, chosen)
    chosen = chosen.repeat_interleave(PAGE, -1)
    return seen | F.pad(chosen, (0, n - chosen.shape[-1]))


def answer(model, cache, last, questions, policy):
    """For each question, whether every token of its answer is the argmax."""
    n = cache[0][0].shape[1] - 1
    rows = [[last] + q["prompt"] + q["answer"] for q in questions]
    b, lq = len(rows), max(map(len, rows))
    tokens = torch.tensor([r + [1] * (lq - len(r)) for r in rows], device="cuda")
    cos, sin = (y.repeat(b, 1) for y in model.angles(torch.arange(n, n + lq, device="cuda")))
    causal = torch.ones(lq, lq, dtype=torch.bool, device="cuda").tril()
    x = F.embedding(tokens.reshape(-1), model.embedding)
    for l, (bk, bv) in zip(model.layers, cache):
        q, k, v = before_attention(x, l["norm1"], l["wqkv"], cos, sin)
        q, k, v = (y.view(b, lq, -1, D).transpose(1, 2) for y in (q, k, v))
        bk, bv = bk[:, :n], bv[:, :n]
        grouped = q.reshape(b, KV, -1, lq, D)
        book = (grouped @ bk[:, None].mT).float() * D ** -0.5
        if policy is not None:
            book = book.masked_fill(~select(q, bk, n, policy)[:, :, None], float("-inf"))
        own = (grouped @ k[:, :, None].mT).float() * D ** -0.5
        p = torch.cat((book, own.masked_fill(~causal, float("-inf"))), -1).softmax(-1).bfloat16()
        a = p[..., :n] @ bv[:, None] + p[..., n:] @ v[:, :, None]
        a = a.reshape(b, HEADS, lq, D).transpose(1, 2).reshape(b * lq, -1)
        x = after_attention(x, a, l["wo"], l["norm2"], l["wgu"], l["wd"])
    said = linear(rms(x, model.norm), model.embedding).argmax(-1).view(b, lq).tolist()
    right = []
    for row, q in zip(said, questions):
        start = len(q["prompt"])
        right.append(row[start : start + len(q["answer"])] == q["answer"])
    return right


@torch.no_grad()
def evaluate(model, books, policies=None):
    """Share of questions answered right, by policy and kind; policies None means full attention alone."""
    policies = policies or {"full": None}
    tally = {}
    for book in books:
        cache = prefill(model, book["book"])
        for name, policy in policies.items():
            for start in range(0, len(book["questions"]), 24):
                part = book["questions"][start : start + 24]
                for q, ok in zip(part, answer(model, cache, book["book"][-1], part, policy)):
                    counts = tally.setdefault(name, {}).setdefault(q["kind"], [0, 0])
                    counts[0] += ok
                    counts[1] += 1
    return {name: {kind: r / n for kind, (r, n) in sorted(kinds.items())} | {"all": sum(r for r, _ in kinds.values()) / sum(n for _, n in kinds.values())}
            for name, kinds in tally.items()}


def show(title, results, log=print):
    for name, kinds in results.items():
        log(f"{title} {name}: " + " ".join(f"{kind} {100 * share:.1f}%" for kind, share in kinds.items()))
