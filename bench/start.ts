// How long a person waits for the demo's table: `npm start`, warm and, if asked, in a fresh clone under a new HOME.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Bench } from "./bench.ts";
import { root } from "./machine.ts";
import type { Row } from "./table.ts";

const warmGoal = 45;
const coldGoal = 120;

/** Seconds that the command takes. Errors with what it said, where it fails. */
function seconds(command: readonly string[], cwd: string, env: Record<string, string | undefined>): number {
  const began = performance.now();
  const { exitCode, stderr } = Bun.spawnSync([...command], { cwd, env, stdin: "ignore" });
  if (exitCode !== 0)
    throw new Error(
      `${command.join(" ")} ended with ${exitCode}: ${stderr.toString().trim().split("\n").slice(-5).join("\n")}`,
    );
  return (performance.now() - began) / 1000;
}

export const start: Bench = {
  title: "npm start: until the demo's table stands",
  async run({ cold, say }) {
    const runner = Bun.which("npm") ?? process.execPath;
    const command = [runner, "run", "start"];
    const rows: Row[] = [];
    const add = (name: string, taken: number, goal: number): void => {
      rows.push({ case: name, unit: "s", seconds: taken, goal, met: taken <= goal });
    };
    say("warm");
    seconds([runner, "run", "build:twin"], root, process.env); // nothing to do, unless a source changed meanwhile
    add("warm, 8192 tokens", seconds(command, root, process.env), warmGoal);
    if (cold) {
      say("a fresh clone");
      const place = mkdtempSync(join(tmpdir(), "freekv-cold-"));
      try {
        const clone = join(place, "freekv");
        // npm tells its children of its own cache and prefix: a newcomer has neither.
        const own = Object.entries(process.env).filter(([key]) => !/^npm_/i.test(key));
        const env = { ...Object.fromEntries(own), HOME: place };
        seconds(["git", "clone", "--quiet", root, clone], place, env);
        add("fresh clone of HEAD, new HOME", seconds(command, clone, env), coldGoal);
      } finally {
        rmSync(place, { recursive: true, force: true });
      }
    }
    return {
      rows,
      notes: ["One run each. The clone pays for packages over the network and for compiling the twin."],
    };
  },
};
