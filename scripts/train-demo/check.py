"""Loads the exported folder with transformers and asks it questions, greedily; and compares the two tokenizers.

    python3 scripts/train-demo/check.py FOLDER BOOKS.jsonl

BOOKS.jsonl is what make-data.ts --evaluate writes. Tokens there come from the JavaScript tokenizer.
"""
import sys

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import evaluate as ev

folder, books = sys.argv[1], ev.load(sys.argv[2])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
same = sum(tokenizer.encode(book["text"]).ids == book["book"] for book in books)
print(f"tokenizers (Rust) and @huggingface/tokenizers (JavaScript) agree on {same} of {len(books)} books", flush=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
right = asked = 0
for book in books[:3]:
    for q in book["questions"][::6]:
        ids = torch.tensor([book["book"] + q["prompt"]], device="cuda")
        with torch.no_grad():
            said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=1)
        said = said[0, ids.shape[1]:].tolist()
        asked += 1
        right += said == q["answer"]
        if said != q["answer"]:
            print(q["kind"], "| expected", tokenizer.decode(q["answer"]), "| said", tokenizer.decode(said), flush=True)
print(f"transformers, greedy, bf16: {right} of {asked} right", flush=True)
