// What a command says: results on stdout, everything else on stderr.

/** The reader of stdout went away (`| head`): the command ends quietly. */
export class ReaderGone extends Error {
  constructor() {
    super("stdout was closed by its reader");
    this.name = "ReaderGone";
  }
}

/** stdout takes no more: a full disk, most often. */
export class OutputLost extends Error {
  constructor(cause: Error) {
    const full = "code" in cause && cause.code === "ENOSPC";
    const reason = full ? "no space is left where it goes; make some" : cause.message;
    super(`stdout cannot be written: ${reason}, or send it elsewhere`, { cause });
    this.name = "OutputLost";
  }
}

export interface OutputOptions {
  /** stdout holds JSON lines only. */
  readonly json: boolean;
  /** Neither progress nor hints. */
  readonly quiet: boolean;
}

const clearLine = "\r\x1b[2K";
/** A status that changes faster than this is not worth drawing. */
const statusMs = 80;

export class Output {
  readonly json: boolean;
  readonly quiet: boolean;
  /** Whether statuses are seen by anyone. */
  readonly live: boolean;
  readonly #styled: boolean;
  #statusShown = false;
  #statusAt = 0;

  constructor({ json, quiet }: OutputOptions) {
    this.json = json;
    this.quiet = quiet;
    const { NO_COLOR, TERM } = process.env;
    this.live = process.stderr.isTTY === true && TERM !== "dumb" && !quiet;
    this.#styled = process.stdout.isTTY === true && TERM !== "dumb" && (NO_COLOR ?? "") === "";
    // A failed write reports to its own callback; without a listener it would also end the process.
    process.stdout.on("error", () => {});
    process.stderr.on("error", () => {});
  }

  /** Text for a person, as it is. Resolves when it is written. Errors: ReaderGone, OutputLost. */
  async text(text: string): Promise<void> {
    this.clearStatus();
    await new Promise<void>((resolve, reject) => {
      process.stdout.write(text, (error) => {
        if (!error) resolve();
        else if ("code" in error && error.code === "EPIPE") reject(new ReaderGone());
        else reject(new OutputLost(error));
      });
    });
  }

  /** Lines for a person; nothing with --json. */
  async lines(...lines: readonly string[]): Promise<void> {
    if (!this.json && lines.length > 0) await this.text(`${lines.join("\n")}\n`);
  }

  /** One JSON line; nothing without --json. */
  async record(value: object): Promise<void> {
    if (this.json) await this.text(`${JSON.stringify(value)}\n`);
  }

  /** Shows what is going on in one line that the next one replaces; only on a TTY. */
  status(text: string): void {
    if (!this.live) return;
    const now = performance.now();
    if (this.#statusShown && now - this.#statusAt < statusMs) return;
    this.#statusAt = now;
    this.#statusShown = true;
    const line = clip(text.replace(/\s+/g, " "), Math.max(20, (process.stderr.columns || 80) - 1));
    process.stderr.write(`${clearLine}${line}`);
  }

  clearStatus(): void {
    if (!this.#statusShown) return;
    this.#statusShown = false;
    process.stderr.write(clearLine);
  }

  /** A remark beside the results; only on a TTY. */
  note(line: string): void {
    if (this.live) process.stderr.write(`${line}\n`);
  }

  /** Resolves when it is written, or cannot be. */
  async error(line: string): Promise<void> {
    this.clearStatus();
    await new Promise<void>((resolve) => process.stderr.write(`${line}\n`, () => resolve()));
  }

  bold(text: string): string {
    return this.#styled ? `\x1b[1m${text}\x1b[22m` : text;
  }
  dim(text: string): string {
    return this.#styled ? `\x1b[2m${text}\x1b[22m` : text;
  }
}

/** At most `width` characters, with an ellipsis where something was cut. */
export function clip(text: string, width: number): string {
  const characters = [...text];
  return characters.length <= width ? text : `${characters.slice(0, Math.max(0, width - 1)).join("")}…`;
}

/** 8192 → "8,192". */
export const thousands = (n: number): string => n.toLocaleString("en-US");

/** The same in any locale and for any size: "24.0 MiB". */
export const mebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
