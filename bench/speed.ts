/// <reference lib="esnext.disposable" preserve="true" />
// The speed table: decode, prompts, recall and their floors at the shape of Llama-3.1-8B with random weights, on the device that
// answers. bench/speed/ has its rows; engines that differ in what an engine fixes come one after another.
//
// Random weights say nothing of how alike queries are, so flags and misses are forced: which heads are flagged is drawn by position,
// layer and head, and page scores are numbers of which a known share is drawn anew in each step (fkv_forced; Core.force). All of the
// work is done whatever they say, and the shares that the device counted are reported.

import { Device } from "../lib/device.ts";
import type { Bench, BenchOptions, Machine } from "./bench.ts";
import { scaled } from "./measure.ts";
import { fragmented, published } from "./speed/baselines.ts";
import { measureRates } from "./speed/floors.ts";
import { growth } from "./speed/growth.ts";
import { gatherLines, launchLines, stepLines } from "./speed/parts.ts";
import { peerLines, readPeers } from "./speed/peers.ts";
import { prompts } from "./speed/prompts.ts";
import { type Line, rowOf, shown } from "./speed/report.ts";
import { Rig } from "./speed/rig.ts";
import { few, forcedSteps, type Run } from "./speed/run.ts";
import { selections } from "./speed/selections.ts";
import { fedTokens, type Shape, shapes } from "./speed/shape.ts";
import { baseSteps, batchSteps, contextSteps, fullSteps } from "./speed/steps.ts";
import type { Row } from "./table.ts";

const rowsOfTable = 15;
const mostSequences = 8;

export const speed: Bench = {
  title: "Speed",
  async run(options) {
    const named = shapes[options.shape ?? "llama-3.1-8b"];
    if (!named) throw new Error(`no shape "${options.shape}"; there are: ${Object.keys(shapes).join(", ")}`);
    const shape = { ...named, steps: options.steps ?? named.steps };
    const { run, rows, machine } = begin(options, shape);
    const { read, toDevice } = run.rates;
    run.emit({ row: null, case: "memory read", unit: "GB/s", value: scaled(read, 1e-9) });
    run.emit({ row: null, case: "large copy to the device", unit: "GB/s", value: scaled(toDevice, 1e-9) });
    if (options.peers) for (const line of peerLines(readPeers(options.peers))) run.emit(line);

    const parts: [rows: number[], part: (run: Run) => Promise<void>][] = [
      [[7], published],
      [[6], fragmented],
      [[4, 12], selections],
      [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15], main],
    ];
    const failures: string[] = [];
    for (const [of, part] of parts) {
      if (!run.wants(...of)) continue;
      try {
        await part(run);
      } catch (error) {
        // What was measured before is kept, and the other parts still run.
        failures.push(`Ended early: ${part.name}: ${(error as Error).message}`);
        process.stderr.write(`bench: speed: ${(error as Error).stack}\n`);
        process.exitCode = 1;
      }
    }
    const notes = [
      `${shape.name}, random weights, pages of ${shape.pageSize}, budget ${shape.budget}; flags and misses are forced, and counted. Of a step: HBM floor = weights, attended K and V and scored digests, each byte once, at the rate of memory read in this run; with recall, and the bytes recalled before attention at the rate of a large copy.`,
      ...failures,
    ];
    // By their numbers; what has none comes last.
    const order = (row: Row): number => Number(row.row ?? rowsOfTable + 1);
    return { rows, shown: rows.toSorted((a, b) => order(a) - order(b)).map(shown), notes, machine };
  },
};

/** The device's name and rates, and where lines go. */
function begin(options: BenchOptions, shape: Shape): { run: Run; rows: Row[]; machine: Machine } {
  const name = options.device ?? "auto";
  using device = Device.open({ device: name as "auto" });
  const { model } = device.info();
  const slug = device.backend === "cpu" ? "twin" : (/[A-Z]+\d+/.exec(model)?.[0] ?? "gpu").toLowerCase();
  const machine = { words: device.backend === "cpu" ? `CPU twin, ${model}` : model, slug };
  const rows: Row[] = [];
  const peers = options.peers ? readPeers(options.peers) : [];
  const { only } = options;
  const unknown = only?.find((row) => row < 1 || row > rowsOfTable);
  if (unknown !== undefined) throw new Error(`the table has no row ${unknown}`);
  const run: Run = {
    ...{ shape, device: device.name, card: model, rates: measureRates(device) },
    peers: new Map(peers.map((peer) => [peer.name, peer.value])),
    known: new Map(),
    wants: (...of) => only === undefined || of.some((row) => only.includes(row)),
    emit(line: Line) {
      rows.push(rowOf(line));
      options.partly(rows, machine);
    },
    say: options.say,
  };
  return { run, rows, machine };
}

/** The engine as users get it, with room for the longest context. */
async function main(run: Run): Promise<void> {
  const { shape } = run;
  const { base, long, longest } = shape.contexts;
  const far = run.wants(1, 5, 9);
  const most = far ? longest : run.wants(8) ? long : base;
  const together = run.wants(1, 6, 11);
  run.say("loading");
  await using rig = await Rig.open(shape, run.device, {
    maxContext: most + fedTokens(shape),
    maxSequences: mostSequences,
    pooledTokens: Math.max(most, together ? mostSequences * base : 0) + base,
    grownBytes: run.wants(15) ? shape.grownBytes : 0,
  });
  if (run.wants(10)) await prompts(run, rig);
  if (run.wants(3, 4, 6, 7, 13, 14)) await baseSteps(run, rig);
  if (run.wants(2)) {
    await launchLines(run, rig);
    await stepLines(run, rig);
  }
  if (run.wants(5, 9)) await contextSteps(run, rig);
  if (run.wants(8)) await fullSteps(run, rig);
  if (together) {
    const states = [];
    for (let i = 0; i < mostSequences; i++) {
      const state = await rig.sequence(base - i * Math.floor(base / 32 / shape.pageSize) * shape.pageSize);
      // Not all of them complete a page in the same step.
      await forcedSteps(rig, [state], few, { warmups: 1, steps: 1 + ((3 * i) % shape.pageSize) });
      states.push(state);
    }
    await batchSteps(run, rig, states);
    if (run.wants(1)) gatherLines(run, rig, states);
    for (const state of states) rig.release(state);
  }
  if (run.wants(15)) await growth(run, rig);
}
