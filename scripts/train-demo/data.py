"""Shards of training documents, written by make-data.ts in parallel while training runs, and read as they appear."""
import glob
import os
import queue
import subprocess
import threading
import time

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
SHARD_TOKENS = 1 << 20
ANSWER, PADDING, ID = 0x8000, 0x4000, 0x07FF


def find_filler(folder, limit=6000):
    """Lists arbitrary text of this machine for books to be made of: sources, documentation. One file in ten is held out."""
    paths = []
    roots = [os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(np.__file__)), "/usr/share", "/usr/include"]
    for root in roots:
        for ending in ("py", "txt", "md", "rst", "h", "html", "pod", "pm", "json", "js", "c"):
            found = glob.iglob(f"{glob.escape(root)}/**/*.{ending}", recursive=True)
            paths += [p for _, p in zip(range(limit // 8), found)]
    paths = sorted({os.path.realpath(p) for p in paths if os.path.isfile(p) and 2000 < os.path.getsize(p) < 200000})
    np.random.default_rng(0).shuffle(paths)
    paths = [p for p in paths if "\n" not in p and "\0" not in p][:limit]
    kept, held = f"{folder}/filler.txt", f"{folder}/held-out.txt"
    for name, part in ((kept, paths[len(paths) // 10:]), (held, paths[: len(paths) // 10])):
        with open(name, "w") as f:
            f.write("\n".join(part) + "\n")
    print(f"{len(paths)} text files found for filler", flush=True)
    return kept, held


def make(bun, out, length, documents, seed, filler, *flags):
    subprocess.run([bun, f"{HERE}/make-data.ts", "--out", out, "--length", str(length), "--documents", str(documents),
                    "--seed", str(seed), "--filler", filler, *flags], check=True)


class Shards:
    """Keeps `workers` processes writing shards, earliest length first, `quota[length]` shards of each."""

    def __init__(self, bun, folder, filler, quota, workers, seed):
        self.folder, self.jobs, self.errors = folder, queue.Queue(), []
        for length, n in quota.items():
            for i in range(n):
                self.jobs.put((length, i))

        def work():
            while not self.errors:
                try:
                    length, i = self.jobs.get_nowait()
                except queue.Empty:
                    return
                try:
                    if os.path.exists(self.path(length, i)):
                        continue
                    make(bun, self.path(length, i), length, SHARD_TOKENS // length, seed * 1000003 + length * 1009 + i, filler)
                except Exception as error:  # reported by the trainer's next batch
                    self.errors.append(error)

        for _ in range(workers):
            threading.Thread(target=work, daemon=True).start()

    def path(self, length, i):
        return f"{self.folder}/{length}-{i}.bin"

    def batches(self, length, documents):
        """Endless batches [documents, length] of int32 on the GPU; shards repeat once all that exist were read."""
        i = 0
        while True:
            while not os.path.exists(self.path(length, i)):
                if self.errors:
                    raise self.errors[0]
                if i > 0:
                    i = 0
                else:
                    time.sleep(0.05)
            shard = torch.from_numpy(np.fromfile(self.path(length, i), np.uint16).astype(np.int32).reshape(-1, length)).cuda()
            for start in range(0, len(shard) - documents + 1, documents):
                yield i, shard[start : start + documents]
            i += 1
