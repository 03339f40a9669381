// Where this package lies: what it ships (native libraries, the demo model) is found from here.

import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The folder of freekv's package.json, from the source and from dist alike. */
export function packageRoot(): string {
  for (let dir = dirname(fileURLToPath(import.meta.url)); dirname(dir) !== dir; dir = dirname(dir)) {
    const file = join(dir, "package.json");
    if (existsSync(file) && JSON.parse(readFileSync(file, "utf8")).name === "freekv") return dir;
  }
  throw new Error("freekv's package.json is in none of the folders above its code; reinstall the package");
}
