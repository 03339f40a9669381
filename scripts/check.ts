// npm run check [-- --fix]: format, lint, import order (Biome) and types (TypeScript). Both always run: one
// visit shows all there is to mend. With --fix, Biome mends what it safely can.

import { root } from "./native.ts";

const write = process.argv.includes("--fix") ? ["--write"] : [];
// Biome colours a pipe, too, unless told otherwise.
const colors = process.stdout.isTTY && process.env.NO_COLOR === undefined ? "force" : "off";
const checks = {
  biome: ["@biomejs/biome/bin/biome", "check", "--error-on-warnings", `--colors=${colors}`, ...write],
  types: ["typescript/bin/tsc", "-p", "tsconfig.json"],
};

let failed = false;
for (const [name, [script, ...words]] of Object.entries(checks)) {
  const start = performance.now();
  const child = Bun.spawn([process.execPath, `node_modules/${script}`, ...words], {
    cwd: root,
    stdio: ["ignore", "inherit", "inherit"],
  });
  const ok = (await child.exited) === 0;
  failed ||= !ok;
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  console.log(`${ok ? "ok  " : "FAIL"} ${name.padEnd(28)} ${seconds.padStart(6)} s`);
}
process.exit(failed ? 1 : 0);
