// Where a native library may be: design section 8's order.

import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { packageRoot } from "./root.ts";

export type LibraryKind = "cpu" | "cuda";

export interface Place {
  readonly path: string;
  readonly origin: "libraryPath" | "platform package" | "dist/native";
}

/** The places of a library, best first. An explicit `libraryPath` is the only one. */
export function libraryPlaces(kind: LibraryKind, libraryPath?: string | URL): Place[] {
  if (libraryPath !== undefined) {
    const given = String(libraryPath);
    // Absolute: a bare name would make the loader search its own places, and not every runtime's FFI passes it on as it is.
    const path = resolve(given.startsWith("file:") ? fileURLToPath(given) : given);
    return [{ path, origin: "libraryPath" }];
  }
  const platform = `${process.platform}-${process.arch}`;
  const file = `libfreekv_${kind}.so`;
  const root = packageRoot();
  const places: Place[] = [{ path: join(root, "dist", "native", platform, file), origin: "dist/native" }];
  const platformPackage = platformPackageDir(root, platform);
  if (platformPackage !== undefined) {
    places.unshift({ path: join(platformPackage, file), origin: "platform package" });
  }
  return places;
}

/** How to get a library that works. Only a clone of the repository has what the build needs. */
export function wayToGet(kind: LibraryKind): string {
  const clone = existsSync(join(packageRoot(), "package-lock.json"));
  if (clone) return kind === "cpu" ? "npm run build:twin" : "npm run build (needs nvcc)";
  return kind === "cpu"
    ? "reinstall this version of freekv"
    : "npm run build in a clone of freekv's repository (needs nvcc); the package has the CPU twin alone";
}

/** An optional package that carries built libraries alone, if it is installed. */
function platformPackageDir(root: string, platform: string): string | undefined {
  try {
    return dirname(createRequire(join(root, "package.json")).resolve(`@freekv/${platform}/package.json`));
  } catch {
    return undefined;
  }
}
