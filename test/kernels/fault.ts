/// <reference lib="esnext.disposable" preserve="true" />
// A process whose GPU context a kernel spoils, and what it is told: for test/module.test.ts, one JSON line. Words: the PTX
// file; "debug" or "graph", or neither.

import { Device, FreeKVError, Module } from "../../lib/device.ts";

const [ptx = "", how = ""] = process.argv.slice(2);
const device = Device.open({ device: "cuda", debug: how === "debug" });
const module = Module.load(device, ptx);
const nothing = module.kernel("nothing", []);
const fault = module.kernel("fault", ["ptr"]);
const stream = device.stream();
const shape = { grid: 1, block: 32, stream };

function attempt(name: string, work: () => void): void {
  try {
    work();
  } catch (error) {
    if (!(error instanceof FreeKVError)) throw error;
    const { code, message, call, detail } = error;
    console.log(JSON.stringify({ at: name, code, message, call, kernels: detail.kernels }));
    process.exit();
  }
}

nothing.launch(shape);
stream.synchronize();
const nowhere = 4; // the first page is nobody's, while a GPU may reach whatever else the process has mapped; aligned as an int is
if (how === "graph") {
  const graph = stream.capture(() => fault.launch(shape, nowhere));
  attempt("launch", () => stream.launch(graph));
} else attempt("launch", () => fault.launch(shape, nowhere));
attempt("synchronize", () => stream.synchronize());
