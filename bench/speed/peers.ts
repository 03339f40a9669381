// Figures of other systems on the same card: bench/speed/peers.py wrote them just before.

import { readFileSync } from "node:fs";
import type { Spread } from "../measure.ts";
import type { Line } from "./report.ts";

interface Peer {
  readonly name: string;
  readonly unit: string;
  readonly value: Spread;
}

/** Its lines are `name,unit,median,p25,p75,least,most` after a header. */
export function readPeers(file: string): Peer[] {
  const [, ...lines] = readFileSync(file, "utf8").trim().split("\n");
  return lines.map((line) => {
    const [name = "", unit = "", ...numbers] = line.split(",");
    const [median, p25, p75, least, most] = numbers.map(Number) as [number, number, number, number, number];
    if (![median, p25, p75, least, most].every(Number.isFinite)) throw new Error(`${file}: "${line}"`);
    return { name, unit, value: { median, p25, p75, least, most } };
  });
}

export const peerLines = (peers: readonly Peer[]): Line[] =>
  peers.map(({ name, unit, value }) => ({ row: null, case: name, unit, value }));
