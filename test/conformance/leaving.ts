/// <reference lib="esnext.disposable" preserve="true" />
// A program that leaves its device open, with work queued: argument 1 is how it ends. leaving.test.ts runs it.

import { once } from "node:events";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import type * as cuda from "freekv/cuda";
import { open } from "./target.ts";

/** A device that nobody disposes, and what keeps its threads busy for a while. */
function leave(): cuda.Device {
  const device = open();
  const stream = device.stream();
  const there = device.alloc(2 ** 20);
  for (let i = 0; i < 2000; i++) stream.memset(there, i & 255);
  return device;
}

async function main(how: string): Promise<void> {
  if (how === "process") {
    leave();
    return;
  }
  const worker = new Worker(new URL(import.meta.url), { workerData: how });
  const ended = once(worker, "exit");
  await once(worker, "message");
  if (how === "terminate") await worker.terminate();
  await ended;
  // Where a library was unloaded under its threads, they fail some time later.
  await new Promise((resolve) => setTimeout(resolve, 100));
  using device = open();
  device.synchronize();
}

if (isMainThread) {
  await main(process.argv[2] ?? "");
  console.log("left");
} else {
  const device = leave();
  parentPort?.postMessage("busy");
  if (workerData === "terminate") setInterval(() => device.info(), 1);
}
