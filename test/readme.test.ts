// The README's examples are the files of test/examples/, and those run.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { packageRoot } from "../ffi/root.ts";

const root = packageRoot();
const readme = readFileSync(join(root, "README.md"), "utf8");
const example = (name: string): string => join(root, "test", "examples", name);
const skip = existsSync(join(root, "lib", "demo-model", "model.safetensors"))
  ? false
  : "the demo model has no weights";

/** Runs an example to its end. */
async function run(name: string): Promise<string> {
  const child = spawn(process.execPath, [example(name)], { stdio: ["ignore", "pipe", "inherit"] });
  let out = "";
  child.stdout.on("data", (data) => {
    out += data;
  });
  const [code] = await once(child, "close");
  assertEquals(code, 0, `${name} ended with ${code}`);
  return out;
}

test("the README shows each example as it is", () => {
  for (const name of ["ask.ts", "bench.ts", "server.ts"])
    assertStringIncludes(readme, `\`\`\`ts\n${readFileSync(example(name), "utf8")}\`\`\``, name);
});

test("the script finds under freekv what streaming dropped", { timeout: 60_000, skip }, async () => {
  const out = await run("ask.ts");
  assertMatch(out, /^freekv: leopard/m);
  assert(!/^streaming: leopard/m.test(out), out);
});

test("the benchmark runs", { timeout: 60_000, skip }, async () => {
  await run("bench.ts");
});

test("the server streams an answer, refuses a bad prompt, and stops when the client leaves", {
  timeout: 60_000,
  skip,
}, async () => {
  const child = spawn(process.execPath, [example("server.ts")], { stdio: ["ignore", "pipe", "inherit"] });
  try {
    const [line] = await once(child.stdout, "data");
    const url = /http\S+/.exec(String(line))?.[0] as string;
    const answer = await fetch(url, {
      method: "POST",
      body: "The code of amber is leopard.\n\nQuestion: What is the code of amber?\nAnswer: The code of amber is",
    });
    assertEquals(answer.status, 200);
    assertMatch(await answer.text(), /^ leopard/);
    const empty = await fetch(url, { method: "POST", body: "x ".repeat(40_000) });
    assertEquals([empty.status, ((await empty.json()) as { code: string }).code], [400, "CONTEXT_TOO_LONG"]);
    const leaving = new AbortController();
    const left = await fetch(url, { method: "POST", body: "Once upon a time", signal: leaving.signal });
    await left.body?.getReader().read();
    leaving.abort();
    const again = await fetch(url, { method: "POST", body: "Once" });
    assertEquals(again.status, 200);
    await again.text();
  } finally {
    child.kill("SIGTERM");
    const [code] = await once(child, "close");
    assertEquals(code, 0);
  }
});
