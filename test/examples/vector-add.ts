/// <reference lib="esnext.disposable" preserve="true" />
// Add two vectors with a kernel of your own: `add` in kernels.cu, which the build has made PTX of.
import * as cuda from "freekv/cuda";

const gpu = cuda.Device.list().find(({ device }) => device !== "cpu");
if (gpu === undefined) {
  console.log("skipped: no GPU, or no CUDA library; `freekv doctor` says what to do");
  process.exit();
}
using device = cuda.Device.open(gpu);
using stream = device.stream();
using module = cuda.Module.load(device, new URL("../../.cache/ptx/kernels.ptx", import.meta.url));
const add = module.kernel("add", ["ptr", "ptr", "ptr", "i32"]);

const n = 1_000_003;
using a = device.alloc(4 * n);
using b = device.alloc(4 * n);
using sum = device.pinned(4 * n); // a kernel writes it, and JavaScript reads it, where it is
stream.copy(
  a,
  Float32Array.from({ length: n }, (_, i) => i),
);
stream.copy(b, new Float32Array(n).fill(0.5));
add.launch({ grid: Math.ceil(n / 256), block: 256, stream }, a, b, sum, n);
stream.synchronize();

const wrong = sum.view(Float32Array).findIndex((value, i) => value !== i + 0.5);
if (wrong >= 0) throw new Error(`element ${wrong} is ${sum.view(Float32Array)[wrong]}`);
console.log(`${device.info().model}: ${n} sums are right`);
