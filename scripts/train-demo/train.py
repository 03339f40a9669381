"""Trains the needle model and exports it as a Hugging Face folder.

    python3 scripts/train-demo/train.py --out DIR --seconds 900 [--bun BUN]

Training is boxed in time: lengths double from 256 to 16384, each for its share of the seconds; the learning rate
decays linearly over the last 40%. The seed fixes weights and data; the number of steps depends on the machine.
DIR gets model/, log.txt, curve.csv, results.json and, every 45 s, last.pt.
"""
import argparse
import concurrent.futures
import csv
import json
import os
import time

import torch

import data
import evaluate as ev
from model import Needle, fastest_attention

#: Tokens a step: small steps while the look-up forms, which takes many; large ones on long documents.
STEP_TOKENS = {256: 32768, 512: 32768, 1024: 32768, 2048: 65536, 4096: 65536, 8192: 65536, 16384: 65536}
SHARES = {256: 0.10, 512: 0.08, 1024: 0.10, 2048: 0.14, 4096: 0.16, 8192: 0.20, 16384: 0.22}
#: Shards (of 1 Mi tokens) per 1000 s of training. Early lengths are read faster than they are written, and repeat.
QUOTA = {256: 140, 512: 120, 1024: 180, 2048: 200, 4096: 200, 8192: 200, 16384: 200}
LANGUAGE_WEIGHT = 0.1
#: A stage up to this length goes on, for up to three times its share, until this accuracy on answers' tokens.
GATED, GATE = 1024, 0.97

flags = argparse.ArgumentParser()
flags.add_argument("--out", required=True)
flags.add_argument("--seconds", type=float, default=900)
flags.add_argument("--seed", type=int, default=1)
flags.add_argument("--lr", type=float, default=1e-3)
flags.add_argument("--bun", default="bun")
flags.add_argument("--work", default="/dev/shm/train-demo")
flags.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
flags.add_argument("--books", type=int, default=16, help="evaluation books of each length")
args = flags.parse_args()

os.makedirs(args.out, exist_ok=True)
os.makedirs(args.work, exist_ok=True)
log_file = open(f"{args.out}/log.txt", "a", buffering=1)
born = time.time()


def log(*parts):
    line = f"[{time.time() - born:7.1f}] " + " ".join(map(str, parts))
    print(line, flush=True)
    log_file.write(line + "\n")


filler, held_out = data.find_filler(args.work)
scale = args.seconds / 1000
shards = data.Shards(args.bun, args.work, filler, {t: max(2, round(n * scale)) for t, n in QUOTA.items()}, args.workers, args.seed)

torch.manual_seed(args.seed)
torch.backends.cuda.matmul.allow_tf32 = True
model = Needle(args.seed).cuda()
count = sum(p.numel() for p in model.parameters())
log(f"{torch.cuda.get_device_name()} torch {torch.__version__}; {count} parameters, {2 * count} bytes in bf16; {vars(args)}")
decayed = [p for p in model.parameters() if p.ndim == 2]
plain = [p for p in model.parameters() if p.ndim < 2]
optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.05), dict(params=plain, weight_decay=0.0)],
                              lr=args.lr, betas=(0.9, 0.98), fused=True)
model.compile()


def eval_books(length, seed):
    path = f"{args.work}/eval-{length}-{seed}.jsonl"
    if not os.path.exists(path):
        per_process = [(path + f".{i}", 1000000 + seed * 1000 + length + i) for i in range(args.books)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda job: data.make(args.bun, job[0], length, 1, job[1], held_out, "--evaluate"), per_process))
        with open(path, "w") as f:
            f.write("".join(open(part).read() for part, _ in per_process))
    return ev.load(path)


def warm_up():
    """Compiles, which takes a while, before the clock starts."""
    for size in sorted(set(STEP_TOKENS.values())):
        tokens = torch.zeros(2, size // 2, dtype=torch.long, device="cuda")
        some = torch.ones(tokens.shape, device="cuda")
        cos, sin = (y.repeat(2, 1) for y in model.angles(torch.arange(size // 2, device="cuda")))
        loss, _ = model.loss(tokens, tokens, some, some, cos, sin, fastest_attention(*tokens.shape))
        loss.backward()
    optimizer.zero_grad(set_to_none=True)
    next(shards.batches(256, 1))
    torch.cuda.synchronize()
    log("compiled; the first shard is here")


def train():
    curve = csv.writer(open(f"{args.out}/curve.csv", "w", newline="", buffering=1))
    curve.writerow("step seconds length lr_scale tokens answer_loss language_loss answer_accuracy tokens_per_second shard".split())
    step = tokens_seen = 0
    sums = torch.zeros(4, device="cuda")
    start = mark = saved = time.time()
    left = dict(SHARES)
    for length in list(left):
        step_tokens = STEP_TOKENS[length]
        documents = step_tokens // length
        attention = fastest_attention(documents, length)
        cos, sin = (y.repeat(documents, 1) for y in model.angles(torch.arange(length, device="cuda")))
        batches = shards.batches(length, documents)
        began = elapsed = (time.time() - start) / args.seconds
        share = left[length] / sum(left.values()) * (1 - began)
        del left[length]
        since, accuracy = 0, 0.0
        mark = time.time()
        while elapsed < 1 and elapsed - began < share * (3 if left and length <= GATED and accuracy < GATE else 1):
            scale = min(1.0, (step + 1) / 100) * max(0.0, min(1.0, (1 - elapsed) / 0.4))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
            shard, batch = next(batches)
            tokens = (batch & data.ID).long()
            target = torch.roll(tokens, -1, 1)
            ahead = torch.roll(batch, -1, 1)
            is_answer = ((ahead & data.ANSWER) != 0).float()
            is_text = ((ahead & data.PADDING) == 0).float()
            is_answer[:, -1] = 0
            is_text[:, -1] = 0
            weight = is_answer / is_answer.sum() + LANGUAGE_WEIGHT * is_text / is_text.sum()
            loss, parts = model.loss(tokens, target, weight, is_answer, cos, sin, attention)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums += parts
            step += 1
            since += 1
            tokens_seen += step_tokens
            if since % 20 == 0:
                answer_loss, right, answers, language = sums.tolist()
                now = time.time()
                accuracy = right / answers
                row = (step, f"{now - start:.1f}", length, f"{scale:.3f}", tokens_seen, f"{answer_loss / answers:.4f}",
                       f"{language / 20:.4f}", f"{accuracy:.4f}", round(20 * step_tokens / (now - mark)), shard)
                curve.writerow(row)
                if since % 100 == 0:
                    log(*row)
                sums.zero_()
                mark = now
                if answer_loss != answer_loss:
                    raise RuntimeError("the loss is not a number; lower --lr")
                if now - saved > 45:
                    saved = now
                    torch.save(dict(model=model.state_dict(), step=step), f"{args.out}/last.pt")
            elapsed = (time.time() - start) / args.seconds
        sums.zero_()
        log(f"length {length} done at step {step}")
    torch.cuda.synchronize()
    log(f"trained {step} steps, {tokens_seen} tokens, {time.time() - start:.0f} s")


def finish():
    torch.save(dict(model=model.state_dict()), f"{args.out}/last.pt")
    model.export(f"{args.out}/model")
    rounded = Needle(args.seed).cuda()
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    results = {}
    for length in (8192, 16384):
        results[f"full {length}"] = ev.evaluate(rounded, eval_books(length, 1))
        ev.show(str(length), results[f"full {length}"], log)
    policies = {"streaming": dict(sink=64, window=128, pages=0)}
    for pages in (12, 24, 36, 48, 56):
        policies[f"retrieve {pages}"] = dict(sink=64, window=128, pages=pages)
        for tau in (0.8, -2.0):
            policies[f"freekv tau {tau} {pages}"] = dict(sink=64, window=128, pages=pages, tau=tau)
    results["policies 8192"] = ev.evaluate(rounded, eval_books(8192, 1)[: max(2, args.books // 4)], policies)
    ev.show("8192", results["policies 8192"], log)
    for name, policy in policies.items():
        if "flags" in policy:
            log(f"{name}: {100 * policy['flags'] / policy['layers']:.1f}% of heads corrected")
    json.dump(results, open(f"{args.out}/results.json", "w"), indent=1)


warm_up()
train()
finish()
log("done")
