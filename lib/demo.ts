// The needle model that the package ships.
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { packageRoot } from "../ffi/root.ts";

/** A Hugging Face folder: `Engine.load(demoModel)`. */
export const demoModel: URL = pathToFileURL(join(packageRoot(), "lib", "demo-model"));
