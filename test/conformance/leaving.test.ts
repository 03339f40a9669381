// A program, or a worker, that ends with a device open: native threads outlive the JavaScript that loaded their library.

import { spawnSync } from "node:child_process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals } from "@std/assert";
import { target } from "./target.ts";

const program = fileURLToPath(import.meta.url).replace(".test.", ".");
const deno = process.versions.deno !== undefined;
const run = deno ? ["run", "--quiet", "--no-lock", "--no-check", "--conditions=source", "--allow-all"] : [];

for (const [how, what] of [
  ["process", "a process that ends"],
  ["worker", "a worker that ends"],
  ["terminate", "a worker that is terminated"],
] as const) {
  test(`${what} with a device open and work queued ends well`, { timeout: 60_000 }, () => {
    const { status, signal, stdout, stderr } = spawnSync(process.execPath, [...run, program, how], {
      encoding: "utf8",
      env: { ...process.env, FREEKV_TEST_DEVICE: target },
      timeout: 50_000,
    });
    assertEquals({ status, signal, stdout }, { status: 0, signal: null, stdout: "left\n" }, stderr);
  });
}
