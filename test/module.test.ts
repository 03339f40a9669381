/// <reference lib="esnext.disposable" preserve="true" />
// Kernels of one's own, on a GPU; what the twin says of them is in conformance/objects.test.ts.

import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { Module } from "../lib/device.ts";
import { examples, open, probe, root, skip, thrown, timeout, without } from "./kernels/rig.ts";

test("a sum of vectors is exact, on buffers of either kind", { timeout, skip }, () => {
  for (const image of [examples, new URL(`file://${examples}`), readFileSync(examples)]) {
    using device = open();
    using stream = device.stream();
    using module = Module.load(device, image);
    const add = module.kernel("add", ["ptr", "ptr", "ptr", "i32"]);
    const n = 100_003;
    using a = device.alloc(4 * n);
    using b = device.pinned(4 * n);
    using sum = device.pinned(4 * (n + 1));
    stream.copy(
      a,
      Float32Array.from({ length: n }, (_, i) => i),
    );
    b.view(Float32Array).forEach((_, i, all) => {
      all[i] = i / 2;
    });
    add.launch({ grid: Math.ceil(n / 128), block: 128, stream }, a, b, sum, n);
    stream.synchronize();
    assertEquals(
      sum.view(Float32Array).findIndex((value, i) => value !== (i < n ? i + i / 2 : 0)),
      -1,
    );
  }
});

test("a graph outlives no module of its kernels", { timeout, skip }, () => {
  using device = open();
  using stream = device.stream();
  const module = Module.load(device, probe);
  const nothing = module.kernel("nothing", []);
  using graph = stream.capture(() => nothing.launch({ grid: 1, block: 1, stream }));
  stream.launch(graph);
  module[Symbol.dispose]();
  assertMatch(thrown("DISPOSED", () => stream.launch(graph)).message, /graph launches kernel nothing/);
  stream.synchronize();
});

test("a kernel runs in the shape that it is launched with", { timeout, skip }, () => {
  using device = open();
  using stream = device.stream();
  using module = Module.load(device, probe);
  using out = device.pinned(256);
  const numbers = out.view(Int32Array);
  module.kernel("shape", ["ptr"]).launch({ grid: [5, 4, 3], block: [8, 2], stream }, out);
  stream.synchronize();
  assertEquals([...numbers.subarray(0, 6)], [5, 4, 3, 8, 2, 1]);
  const most = device.info().sharedBytesPerBlock;
  assert(most > 49152, `${most}`);
  for (const n of [10, 48 * 256 + 1, most / 4]) {
    module
      .kernel("shared_sum", ["ptr", "i32"])
      .launch({ grid: 1, block: 64, sharedBytes: 4 * n, stream }, out, n);
    stream.synchronize();
    assertEquals(out.view(BigUint64Array)[0], BigInt((n * (n - 1)) / 2));
  }
});

test("a graph of launches replays them, with the values of the capture", { timeout, skip }, () => {
  for (const debug of [false, true]) {
    using device = open(debug);
    using stream = device.stream();
    using module = Module.load(device, examples);
    const add = module.kernel("add", ["ptr", "ptr", "ptr", "i32"]);
    using x = device.pinned(16);
    using y = device.pinned(16);
    const shape = { grid: 1, block: 32, stream };
    using graph = stream.capture(() => {
      add.launch(shape, x, y, y, 3);
      add.launch(shape, y, y, y, 2);
    });
    assertEquals([...graph.kernels], ["add"]);
    x.view(Float32Array).fill(1);
    stream.synchronize();
    assertEquals([...y.view(Float32Array)], [0, 0, 0, 0]);
    for (const expected of [
      [2, 2, 1, 0],
      [6, 6, 2, 0],
    ]) {
      stream.launch(graph);
      stream.synchronize();
      assertEquals([...y.view(Float32Array)], expected);
    }
  }
});

test("a kernel that is not there, or is declared otherwise, is refused when it is asked for", {
  timeout,
  skip,
}, () => {
  using device = open(true);
  const module = Module.load(device, examples);
  const message = (fn: () => unknown): string => thrown("BAD_ARGUMENT", fn).message;
  const names = message(() => module.kernel("ad", []));
  assertMatch(names, /no kernel ad, but: (add, iterate|iterate, add)\. .*extern "C"/);
  assertMatch(
    message(() => module.kernel("add", ["ptr", "ptr", "ptr"])),
    /kernel add takes 4 arguments of 8, 8, 8, 4 bytes; 3 arguments of 8, 8, 8 bytes were declared/,
  );
  assertMatch(
    message(() => module.kernel("add", ["ptr", "ptr", "ptr", "u64"])),
    /8, 8, 8, 4 bytes; 4 arguments of 8, 8, 8, 8/,
  );
  assertMatch(
    message(() => module.kernel("add", ["float" as "ptr"])),
    /float is none of ptr, i8/,
  );
  const add = module.kernel("add", ["ptr", "ptr", "ptr", "i32"]);
  using stream = device.stream();
  module[Symbol.dispose]();
  module[Symbol.dispose]();
  thrown("DISPOSED", () => module.kernel("add", []));
  thrown("DISPOSED", () => add.launch({ grid: 1, block: 1, stream }, null, null, null, 0));
});

test("a launch that cannot be is refused at the launch, with the kernel's name", { timeout, skip }, () => {
  using device = open();
  using other = open();
  using stream = device.stream();
  using strange = other.stream();
  using module = Module.load(device, probe);
  const nothing = module.kernel("nothing", []);
  const fine = { grid: 1, block: 1, stream };
  const most = device.info().sharedBytesPerBlock;
  const bad: [RegExp, object][] = [
    [
      /kernel nothing: a block of 2048 threads; with \d+ registers a thread it can have 1024/,
      { block: [512, 4] },
    ],
    [/kernel nothing: block dimension x is 1025; it must be 1 to 1024/, { block: 1025 }],
    [/kernel nothing: block must have integers/, { block: 0 }],
    [/kernel nothing: grid must have integers/, { grid: [1, 1.5] }],
    [/kernel nothing: grid dimension y is 65536; it must be 1 to 65535/, { grid: [1, 65536] }],
    [/kernel nothing: \d+ bytes of shared memory .* more than the \d+/, { sharedBytes: most + 1 }],
    [/kernel nothing: .*shared_bytes must be a uint32, got -1/, { sharedBytes: -1 }],
    [/kernel nothing: the stream belongs to another device/, { stream: strange }],
  ];
  if (Number(device.info().computeCapability) >= 9) {
    bad.push([
      /kernel nothing: grid dimension x of 3 is no multiple of the cluster's 2/,
      { grid: 3, cluster: 2 },
    ]);
    bad.push([/kernel nothing: a cluster of 32 blocks; it can have 16/, { grid: 32, cluster: 32 }]);
  }
  for (const [text, options] of bad) {
    assertMatch(thrown("BAD_ARGUMENT", () => nothing.launch({ ...fine, ...options })).message, text);
  }
  nothing.launch(fine); // none of it did any harm
  stream.synchronize();
});

test("what is no image is refused when it is loaded, with the driver's reason", { timeout, skip }, () => {
  using device = open(true);
  const text = readFileSync(examples, "utf8");
  const bytes = (of: string): Uint8Array => new TextEncoder().encode(of);
  const elf = new Uint8Array(256);
  elf.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]);
  const bad: [RegExp, Uint8Array | string][] = [
    [/neither a cubin, a fatbin nor PTX/, bytes("hello")],
    [/INVALID_PTX|InvalidPtx.*|ptxas/i, bytes(text.replace("fma.rn.f32", "fma.rn.f99"))],
    [/newer CUDA|UnsupportedPtx|InvalidPtx/i, bytes(text.replace(/\.version \d+\.\d+/, ".version 99.9"))],
    [/no cubin/, elf],
    [/ENOENT/, "no-such-file.ptx"],
  ];
  for (const [reason, image] of bad)
    assertMatch(thrown("BAD_ARGUMENT", () => Module.load(device, image)).message, reason);
  using module = Module.load(device, examples); // none of it did any harm
  module.kernel("add", ["ptr", "ptr", "ptr", "i32"]);
});

test("cubins and fatbins of nvcc load, cut off ones do not, and clusters form", { timeout, skip }, () => {
  const nvcc = ["nvcc", "/usr/local/cuda/bin/nvcc"].find(
    (each) => spawnSync(each, ["--version"], { stdio: "ignore" }).status === 0,
  );
  if (nvcc === undefined) return console.log("skipped: no nvcc");
  using device = open();
  using stream = device.stream();
  using out = device.pinned(64);
  const capability = device.info().computeCapability ?? "";
  const sm = `sm_${capability.replace(".", "")}`;
  const dir = mkdtempSync(join(tmpdir(), "freekv-module-"));
  try {
    for (const kind of ["cubin", "fatbin"]) {
      const file = join(dir, `probe.${kind}`);
      const words = [`-${kind}`, `-arch=${sm}`, join(root, "test", "kernels", "probe.cu"), "-o", file];
      const { status, stderr } = spawnSync(nvcc, words, { encoding: "utf8" });
      assertEquals(status, 0, stderr);
      using module = Module.load(device, file);
      module.kernel("shape", ["ptr"]).launch({ grid: 2, block: 3, stream }, out);
      stream.synchronize();
      assertEquals([...out.view(Int32Array, 0, 6)], [2, 1, 1, 3, 1, 1]);
      const image = readFileSync(file);
      assertMatch(
        thrown("BAD_ARGUMENT", () => Module.load(device, image.subarray(0, image.length >> 1))).message,
        /cut off/,
      );
      if (Number(capability) < 9) continue;
      for (const cluster of [4, 16]) {
        module.kernel("ranks", ["ptr"]).launch({ grid: 16, block: 32, cluster, stream }, out);
        stream.synchronize();
        assertEquals(
          [...out.view(Int32Array)],
          Array.from({ length: 16 }, (_, i) => i % cluster),
        );
      }
    }
  } finally {
    rmSync(dir, { recursive: true });
  }
});

/** NVRTC of a Python package, as PyTorch brings it, where the system has none. */
function nvrtcOfPython(): string | undefined {
  const search = `import glob, sys
found = [f for p in sys.path for f in glob.glob(p + "/nvidia/*/lib/libnvrtc.so.*")]
print(found[0] if found else "")`;
  return spawnSync("python3", ["-c", search], { encoding: "utf8" }).stdout?.trim() || undefined;
}

test("a source is compiled and runs, and one that does not compile says where", { timeout, skip }, () => {
  using device = open(true);
  const source = `extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }`;
  const missing = thrown("BAD_ARGUMENT", () => Module.compile(device, source, { nvrtcPath: "/no/such.so" }));
  assertEquals(missing.detail.status, "UNSUPPORTED");
  assertMatch(missing.message, /no NVRTC could be loaded; install .*\/no\/such\.so/);
  let nvrtcPath: string | undefined;
  const compile = (text: string, options: readonly string[]): Module =>
    Module.compile(device, text, { name: "twice.cu", options, nvrtcPath });
  try {
    compile(source, ["-DFACTOR=2"])[Symbol.dispose]();
  } catch (error) {
    nvrtcPath = nvrtcOfPython();
    assertMatch((error as Error).message, /no NVRTC could be loaded/);
    if (nvrtcPath === undefined) return console.log("skipped: no NVRTC here");
  }
  using stream = device.stream();
  using x = device.pinned(16);
  for (const options of [["-DFACTOR=2"], ["--define-macro=FACTOR=2", "--gpu-architecture=compute_80"]]) {
    using module = compile(source, options);
    x.view(Float32Array).set([1, 2, 3, 4]);
    module.kernel("twice", ["ptr"]).launch({ grid: 1, block: 4, stream }, x);
    stream.synchronize();
    assertEquals([...x.view(Float32Array)], [2, 4, 6, 8]);
    using again = Module.load(device, module.image);
    again.kernel("twice", ["ptr"]);
  }
  const wrong = thrown("BAD_ARGUMENT", () => compile("__global__ void f() {\n  nothing;\n}", []));
  assertMatch(wrong.message, /twice\.cu does not compile:[\s\S]*twice\.cu\(2\)[\s\S]*nothing/);
  assertMatch(String(wrong.detail.log), /twice\.cu\(2\)/);
  thrown("BAD_ARGUMENT", () => compile(source, ["--no-such-option"]));
});

test("an illegal address is told with the kernel's name, at the launch in debug mode", {
  timeout,
  skip,
}, () => {
  for (const [how, at] of [
    ["", "synchronize"],
    ["graph", "synchronize"],
    ["debug", "launch"],
  ] as const) {
    const words = [join(root, "test", "kernels", "fault.ts"), probe, how];
    const { stdout, stderr } = spawnSync(process.execPath, words, { encoding: "utf8" });
    const told = JSON.parse(stdout || `{"at": ${JSON.stringify(stderr)}}`);
    assertEquals([told.at, told.code, told.kernels], [at, "DEVICE_FAILED", ["fault"]]);
    assertMatch(told.message, /illegal memory access.*kernel fault was running/);
  }
});

for (const [example, right] of [
  ["vector-add.ts", /: 1000003 sums are right$/],
  ["overlap.ts", /: one stream [\d.]+ ms, three [\d.]+ ms, the same numbers$/],
] as const) {
  test(`the example ${example} runs on a GPU, or says why it does not`, { timeout }, () => {
    const file = join(root, "test", "examples", example);
    const { status, stdout, stderr } = spawnSync(process.execPath, [file], { encoding: "utf8" });
    assertEquals(status, 0, stderr);
    console.log(stdout.trim());
    assertMatch(stdout.trim(), without === undefined ? right : /^skipped: no GPU/);
  });
}
