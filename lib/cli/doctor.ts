/// <reference lib="esnext.disposable" preserve="true" />
// freekv doctor: what this machine offers, what is wrong, and what to do.
import { existsSync } from "node:fs";
import { availableParallelism, freemem, totalmem } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Command } from "commander";
import { packageRoot } from "../../ffi/root.ts";
import { type LibraryKind, libraryPlaces, wayToGet } from "../../ffi/search.ts";
import { demoModel } from "../demo.ts";
import { Device, type DeviceInfo, Event } from "../device.ts";
import { FreeKVError } from "../errors.ts";
import type { EngineOptions } from "../types.ts";
import { addDeviceFlags, type EngineFlags, engineOptions } from "./flags.ts";
import { mebibytes } from "./output.ts";
import type { Session } from "./session.ts";
import { version } from "./version.ts";

type DeviceChoice = NonNullable<EngineOptions["device"]>;

const linkBytes = 64 * 2 ** 20;
const linkCopies = 4;

interface Place {
  path: string;
  /** null: this one was loaded. */
  problem: string | null;
}
/** One kind of device: where its library was looked for, and the device that opened, or why none did. */
interface Finding {
  kind: LibraryKind;
  tried: Place[];
  device: (DeviceInfo & { name: string; h2dBytesPerSecond: number; d2hBytesPerSecond: number }) | null;
  error: FreeKVError | null;
}

export function addDoctor(program: Command, run: (flags: EngineFlags) => Promise<void>): void {
  const command = program
    .command("doctor")
    .description("Runtime, native library, device and link: what works, what does not, and what to do.");
  addDeviceFlags(command).action(run);
}

export async function doctor(flags: EngineFlags, { out, signal, start }: Session): Promise<void> {
  await signalsHeard(signal);
  const { device = "auto", libraryPath, debug } = engineOptions(flags);
  const findings: Finding[] = [];
  for (const [kind, name] of choicesOf(device, libraryPath !== undefined)) {
    findings.push(examine(kind, name, { libraryPath, debug }));
    await signalsHeard(signal);
  }
  const working = findings.find((finding) => finding.device !== null);
  const { bun, deno, node } = process.versions;
  const runtime = bun ? `Bun ${bun}` : deno ? `Deno ${deno}` : `Node ${node}`;
  const machine = {
    runtime,
    platform: `${process.platform}-${process.arch}`,
    cores: availableParallelism(),
    memoryBytes: totalmem(),
    freeMemoryBytes: freemem(),
    package: packageRoot(),
    demoModel: existsSync(join(fileURLToPath(demoModel), "model.safetensors")),
  };

  await start(working?.device?.name ?? null, {});
  await out.record({ machine });
  const memory = `${mebibytes(machine.memoryBytes)} memory, ${mebibytes(machine.freeMemoryBytes)} free`;
  await out.lines(
    `freekv       ${version()} in ${machine.package}`,
    `runtime      ${runtime}, ${machine.platform}, ${machine.cores} cores, ${memory}`,
    `demo model   ${machine.demoModel ? "there" : "missing: reinstall the package, or restore lib/demo-model"}`,
  );
  for (const finding of findings) {
    const { error, ...told } = finding;
    const advice = error === null ? null : adviceOf(finding, device);
    await out.record({
      library: {
        ...told,
        error: error === null ? null : { code: error.code, message: error.message },
        advice,
      },
    });
    await out.lines(...linesOf(finding, advice));
  }

  const summary = { ok: working !== undefined, device: working?.device?.name ?? null };
  await out.record({ summary });
  if (working !== undefined) {
    await out.lines("", out.bold(`ready on ${summary.device}`));
    return;
  }
  const advice = findings.map((finding) => adviceOf(finding, device)).join("; ");
  throw new FreeKVError("NO_DEVICE", `no device works here; ${advice}`);
}

/** To open and measure a device blocks: a signal that came meanwhile is known only after the event loop has turned. */
async function signalsHeard(signal: AbortSignal): Promise<void> {
  await new Promise((resolve) => setImmediate(resolve));
  signal.throwIfAborted();
}

/** The libraries to look at, and what to open each with. One given by its path says itself what it is. */
function choicesOf(device: DeviceChoice, given: boolean): [LibraryKind, DeviceChoice][] {
  if (device === "cpu" || (device === "auto" && given)) return [["cpu", device]];
  return device === "auto"
    ? [
        ["cuda", "cuda"],
        ["cpu", "cpu"],
      ]
    : [["cuda", device]];
}

function examine(
  kind: LibraryKind,
  name: DeviceChoice,
  choice: { libraryPath: string | URL | undefined; debug: boolean | undefined },
): Finding {
  const places = libraryPlaces(kind, choice.libraryPath).map(({ path }) => path);
  try {
    using device = Device.open({ device: name, ...choice });
    const loaded = places.indexOf(device.libraryPath);
    const tried = places
      .slice(0, loaded + 1)
      .map((path, i) => ({ path, problem: i === loaded ? null : "no such file" }));
    return {
      kind: device.backend,
      tried,
      device: { name: device.name, ...device.info(), ...measureLink(device) },
      error: null,
    };
  } catch (error) {
    if (!(error instanceof FreeKVError)) throw error;
    const listed = error.detail.tried as { path: string; reason: string }[] | undefined;
    const tried =
      listed?.map(({ path, reason }) => ({ path, problem: reason })) ??
      places.map((path) => ({ path, problem: error.message }));
    return { kind, tried, device: null, error };
  }
}

/** Bytes a second of large copies from and to pinned memory, one way at a time. */
function measureLink(device: Device): { h2dBytesPerSecond: number; d2hBytesPerSecond: number } {
  using stream = device.stream();
  using host = device.pinned(linkBytes);
  using memory = device.alloc(linkBytes);
  using start = device.event();
  using end = device.event();
  const rate = (copy: () => void): number => {
    copy(); // the first touch of the pages
    stream.record(start);
    for (let i = 0; i < linkCopies; i++) copy();
    stream.record(end);
    stream.synchronize();
    return (1000 * linkCopies * linkBytes) / Event.elapsedMs(start, end);
  };
  return {
    h2dBytesPerSecond: rate(() => stream.copy(memory, host, linkBytes)),
    d2hBytesPerSecond: rate(() => stream.copy(host, memory, linkBytes)),
  };
}

/** What to do about a device that does not work; for a GPU nobody asked for, how to get it. */
function adviceOf({ kind, error }: Finding, asked: string): string {
  if (error === null) return "nothing";
  if (error.code === "ABI_MISMATCH") return `get the ${kind} library of this version: ${wayToGet(kind)}`;
  if (error.code !== "LIBRARY_NOT_FOUND") return error.message.replace(/\s*\n\s*/g, " ");
  const get = `get the ${kind === "cpu" ? "CPU twin" : "CUDA library"}: ${wayToGet(kind)}`;
  return kind === "cpu" || asked === "auto" ? get : `${get}; or use --device cpu`;
}

function linesOf({ kind, tried, device }: Finding, advice: string | null): string[] {
  const lines = tried.map(
    ({ path, problem }, i) =>
      `${(i === 0 ? kind : "").padEnd(13)}${path}${problem === null ? "" : `: ${problem.replace(/\s*\n\s*/g, " ")}`}`,
  );
  if (device === null) return [...lines, `             not usable; ${advice}`];
  const units =
    device.computeCapability === null
      ? ""
      : `, ${device.multiprocessors} multiprocessors, compute capability ${device.computeCapability}`;
  return [
    ...lines,
    `  device     ${device.name}: ${device.model}${units}`,
    `  memory     ${mebibytes(device.totalBytes)}, ${mebibytes(device.freeBytes)} free`,
    `  link       ${gigabytes(device.h2dBytesPerSecond)} to the device, ${gigabytes(device.d2hBytesPerSecond)} from it (copies of 64 MiB)`,
  ];
}

const gigabytes = (bytesPerSecond: number): string => `${(bytesPerSecond / 1e9).toFixed(1)} GB/s`;
