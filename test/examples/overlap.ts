/// <reference lib="esnext.disposable" preserve="true" />
// Copy in, compute and copy out at the same time: a stream for each, joined by events, two buffers in turn.
import * as cuda from "freekv/cuda";

const gpu = cuda.Device.list().find(({ device }) => device !== "cpu");
if (gpu === undefined) {
  console.log("skipped: no GPU, or no CUDA library; `freekv doctor` says what to do");
  process.exit();
}
using device = cuda.Device.open(gpu);
using module = cuda.Module.load(device, new URL("../../.cache/ptx/kernels.ptx", import.meta.url));
const iterate = module.kernel("iterate", ["ptr", "ptr", "i64", "f32", "i32"]);

const chunks = 32;
const n = 1 << 20; // numbers of a chunk
const bytes = 4 * n;
const rounds = 2000; // about as long as a copy
using owned = new DisposableStack();
const [first, computing, last] = [device.stream(), device.stream(), device.stream()].map((each) =>
  owned.use(each),
) as [cuda.Stream, cuda.Stream, cuda.Stream];
const event = (): cuda.Event => owned.use(device.event());
const slots = [0, 1].map(() => ({
  x: owned.use(device.alloc(bytes)),
  y: owned.use(device.alloc(bytes)),
  arrived: event(),
  computed: event(),
  left: event(),
}));
using input = device.pinned(chunks * bytes);
using output = device.pinned(chunks * bytes);
const x = input.view(Float32Array);
for (let i = 0; i < x.length; i++) x[i] = (i % 1000) / 1000;

/** Milliseconds of all chunks, on these three streams, which may be one. */
function run(copyIn: cuda.Stream, compute: cuda.Stream, copyOut: cuda.Stream): number {
  using start = device.event();
  using end = device.event();
  copyIn.record(start);
  for (let i = 0; i < chunks; i++) {
    const { x, y, arrived, computed, left } = slots[i % 2] as (typeof slots)[number];
    if (i >= 2) copyIn.wait(computed); // x has been read
    copyIn.copy(x, input.address + i * bytes, bytes);
    copyIn.record(arrived);
    compute.wait(arrived);
    if (i >= 2) compute.wait(left); // y has been copied
    iterate.launch({ grid: 512, block: 256, stream: compute }, y, x, n, 0.5, rounds);
    compute.record(computed);
    copyOut.wait(computed);
    copyOut.copy(output.address + i * bytes, y, bytes);
    copyOut.record(left);
  }
  copyOut.record(end);
  end.synchronize();
  return cuda.Event.elapsedMs(start, end);
}

run(computing, computing, computing); // the first time is not the usual one
const serial = run(computing, computing, computing);
output.view(Uint8Array).fill(0);
const overlapped = run(first, computing, last);

// What overlapping must not change.
const y = output.view(Float32Array);
for (let i = 0; i < y.length; i += 997) {
  let value = Math.fround(0.5 * (x[i] as number));
  for (let round = 0; round < rounds; round++) value = Math.fround(value * value - 1.5); // one rounding, as fma has
  if (y[i] !== value) throw new Error(`element ${i} is ${y[i]}, not ${value}`);
}
const [one, three] = [serial, overlapped].map((ms) => `${ms.toFixed(2)} ms`);
console.log(`${device.info().model}: one stream ${one}, three ${three}, the same numbers`);
