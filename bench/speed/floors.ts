/// <reference lib="esnext.disposable" preserve="true" />
// What this device can do at best, measured in the run that it judges: reading its memory, copying to it over the bus.

import { mkdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { type Device, Module } from "../../lib/device.ts";
import { root } from "../machine.ts";
import { deviceMs, type Spread, spread } from "../measure.ts";

/** Both in bytes a second, as samples' spread. */
export interface Rates {
  readonly read: Spread;
  readonly toDevice: Spread;
}

const mebi = 2 ** 20;

/** `samples` rates of `bytes` in these milliseconds. */
const rates = (bytes: number, ms: readonly number[]): Spread =>
  spread(ms.map((each) => bytes / (each / 1e3)));

export function measureRates(device: Device): Rates {
  return device.backend === "cuda"
    ? { read: memoryRead(device, 4096 * mebi), toDevice: hostToDevice(device, 256 * mebi) }
    : { read: memoryCopy(device, 64 * mebi), toDevice: hostToDevice(device, 64 * mebi) };
}

/** Memory far larger than the caches, read once a sample, in the best of several ways: what any kernel may hope for. */
function memoryRead(device: Device, wanted: number): Spread {
  using owned = new DisposableStack();
  const stream = owned.use(device.stream());
  const module = owned.use(kernels(device));
  const memory = owned.use(device.alloc(wanted));
  const sum = owned.use(device.alloc(256));
  stream.memset(memory, 0x5a);
  const { multiprocessors } = device.info();
  const ways: Spread[] = [];
  for (const inFlight of [4, 8, 16]) {
    const read = module.kernel(`read_memory_${inFlight}`, ["ptr", "u64", "u64", "u64", "ptr"]);
    for (const [block, perProcessor] of readShapes)
      for (const far of [true, false]) {
        const grid = perProcessor * multiprocessors;
        const turnBytes = 16 * grid * block * inFlight;
        const bytes = Math.floor(wanted / turnBytes) * turnBytes;
        // A thread's loads far apart, all threads' next to each other; or each block's next to each other.
        const own = far ? block : block * inFlight;
        const stride = far ? block * grid : block;
        const ms = deviceMs(device, stream, { atLeast: 8, budgetMs: 0 }, () =>
          read.launch({ grid, block, stream }, memory, bytes / 16, own, stride, sum),
        );
        ways.push(rates(bytes, ms));
      }
  }
  return ways.reduce((best, way) => (way.median > best.median ? way : best));
}

/** Threads of a block, blocks of a multiprocessor. */
const readShapes = [
  [256, 2],
  [256, 4],
  [256, 8],
  [512, 2],
  [512, 4],
  [1024, 1],
  [1024, 2],
] as const;

/** The bench's kernels, compiled for this device. */
function kernels(device: Device): Module {
  const source = join(root, "bench", "speed", "read.cu");
  const compiler = Bun.which("nvcc") ?? Bun.which("/usr/local/cuda/bin/nvcc");
  if (compiler === null) return Module.compile(device, readFileSync(source, "utf8"), { name: "read.cu" });
  return Module.load(device, compilePtx(compiler, source));
}

/** The path of the PTX. */
function compilePtx(compiler: string, source: string): string {
  const dir = join(root, ".cache", "bench");
  mkdirSync(dir, { recursive: true });
  const file = join(dir, `${basename(source, ".cu")}.ptx`);
  const words = ["-ptx", "-O3", "-std=c++20", "-arch=compute_80", source, "-o", file];
  const built = Bun.spawnSync([compiler, ...words]);
  if (!built.success) throw new Error(`${source} does not compile:\n${built.stderr.toString()}`);
  return file;
}

/** The twin runs no kernels of ours: its memory is read by copying it. */
function memoryCopy(device: Device, bytes: number): Spread {
  using owned = new DisposableStack();
  const stream = owned.use(device.stream());
  const [from, to] = [owned.use(device.alloc(bytes)), owned.use(device.alloc(bytes))];
  const ms = deviceMs(device, stream, { atLeast: 5, budgetMs: 0 }, () => stream.copy(to, from));
  return rates(bytes, ms);
}

function hostToDevice(device: Device, bytes: number): Spread {
  using owned = new DisposableStack();
  const stream = owned.use(device.stream());
  const from = owned.use(device.pinned(bytes));
  const to = owned.use(device.alloc(bytes));
  const ms = deviceMs(device, stream, { atLeast: 20, budgetMs: 0 }, () => stream.copy(to, from));
  return rates(bytes, ms);
}
