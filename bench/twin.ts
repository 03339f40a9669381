// The twin's kernels against this machine's floors, at the shapes of one layer of Llama-3.1-8B in bf16, memory larger than the caches.

import { attention } from "./attention.ts";
import type { Bench, BenchOptions } from "./bench.ts";
import { threadCounts } from "./floors.ts";
import { matmul } from "./matmul.ts";
import { retrieval } from "./retrieval.ts";
import type { Row } from "./table.ts";

export const twin: Bench = {
  title: "Twin: kernels against this machine's floors",
  async run(options: BenchOptions) {
    const rows: Row[] = [];
    for (const floors of options.floors()) rows.push(...matmul(floors, options));
    const all = options.floors()[threadCounts.length - 1]!;
    rows.push(...attention(all, options), ...retrieval(all, options));
    return {
      rows,
      notes: [
        "Llama-3.1-8B, bf16. share: of the best sample of the floor measured in this run (bytes: reading memory; flops: f32 multiply-add; recall: copying memory). Goals hold for two threads.",
      ],
    };
  },
};
