// What benches hand over: rows of named values. One set of rows makes the Markdown table, the CSV file and the JSON lines.

export type Value = string | number | boolean | null;
/** Columns in their order; all rows of a table have the same ones. null: does not apply. */
export type Row = Readonly<Record<string, Value>>;

export interface Table {
  readonly rows: readonly Row[];
  /** What the Markdown table shows, where that is not all of `rows`. */
  readonly shown?: readonly Row[] | undefined;
  /** What a reader must know to judge the rows; a sentence each. */
  readonly notes?: readonly string[];
}

/** Four significant digits; whole numbers as they are. */
function shown(value: Value | undefined): string {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "string" || Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(4)));
}

export function markdown({ rows, notes = [] }: Table): string {
  const columns = Object.keys(rows[0] ?? {});
  const body = rows.map((row) => columns.map((column) => shown(row[column])));
  const widths = columns.map((column, i) => Math.max(column.length, ...body.map((line) => line[i]!.length)));
  const numeric = columns.map((column) => rows.some((row) => typeof row[column] === "number"));
  const line = (cells: readonly string[]): string =>
    `| ${cells.map((cell, i) => (numeric[i] ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!))).join(" | ")} |`;
  const rule = `|${widths.map((width, i) => (numeric[i] ? `${"-".repeat(width + 1)}:` : "-".repeat(width + 2))).join("|")}|`;
  return [line(columns), rule, ...body.map(line), ...notes.flatMap((note) => ["", note])].join("\n");
}

/** RFC 4180, with a header line; what does not apply is empty. */
export function csv(rows: readonly Row[]): string {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value: Value | undefined): string => {
    const text =
      value === null || value === undefined
        ? ""
        : typeof value === "number"
          ? String(Number(value.toPrecision(6)))
          : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns.join(","), ...rows.map((row) => columns.map((column) => cell(row[column])).join(","))]
    .map((each) => `${each}\n`)
    .join("");
}
