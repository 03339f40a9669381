import type { Rng } from "./rng.ts";
import { NAMES, VALUES } from "./words.ts";

/**
 * What surrounds the facts. A unit is a stretch of text that starts with its own white space and ends without any,
 * at a sentence's or a line's end: facts go between units, and token counts of units add up.
 */
export type Unit = string;

const PEOPLE = [
  "Anna",
  "Ben",
  "the captain",
  "the miller",
  "a traveller",
  "the old clerk",
  "Mira",
  "the children",
  "Tom",
  "the baker",
  "a stranger",
  "the night guard",
  "Professor Hale",
  "the pilot",
];
const VERBS = [
  "carried",
  "found",
  "watched",
  "painted",
  "repaired",
  "described",
  "counted",
  "hid",
  "sold",
  "remembered",
  "measured",
  "dropped",
  "borrowed",
  "ignored",
];
const THINGS = [
  "the heavy box",
  "a broken clock",
  "three letters",
  "the long report",
  "some old tools",
  "a small engine",
  "the missing page",
  "a bag of seeds",
  "the wooden chair",
  "two glass jars",
  "the morning paper",
  "an empty cup",
];
const PLACES = [
  "near the station",
  "behind the house",
  "at the edge of town",
  "under the stairs",
  "by the water",
  "in the north room",
  "across the road",
  "on the second floor",
  "along the wall",
  "outside the office",
];
const TIMES = [
  "before noon",
  "last winter",
  "after the meeting",
  "every other day",
  "late at night",
  "in early spring",
  "without a word",
  "for the third time",
  "while it rained",
  "as usual",
];
const LINKS = ["Later", "Still", "By then", "Of course", "However", "Meanwhile", "In the end", "As a rule"];
const IDENTS = [
  "count",
  "index",
  "total",
  "buffer",
  "result",
  "node",
  "left",
  "right",
  "size",
  "offset",
  "state",
  "key",
  "item",
  "limit",
  "depth",
  "name",
];
const CALLS = [
  "read",
  "write",
  "push",
  "update",
  "merge",
  "scan",
  "reset",
  "load",
  "open",
  "check",
  "append",
  "format",
];

type Style = (rng: Rng) => Unit;

const capital = (text: string): string => text.charAt(0).toUpperCase() + text.slice(1);

function sentence(rng: Rng): string {
  const core = `${rng.pick(PEOPLE)} ${rng.pick(VERBS)} ${rng.pick(THINGS)} ${rng.pick(PLACES)}`;
  const form = rng.int(0, 4);
  if (form === 0) return `${rng.pick(LINKS)}, ${core}.`;
  if (form === 1) return `${capital(core)} ${rng.pick(TIMES)}.`;
  if (form === 2) return `${capital(core)}, and ${rng.pick(PEOPLE)} ${rng.pick(VERBS)} ${rng.pick(THINGS)}.`;
  if (form === 3) return `"Who ${rng.pick(VERBS)} ${rng.pick(THINGS)}?" asked ${rng.pick(PEOPLE)}.`;
  return `${capital(core)}.`;
}

/** Words of the facts in sentences that state no fact: a name alone must not be enough to find an answer. */
function decoy(rng: Rng): string {
  const name = rng.pick(NAMES);
  const value = rng.pick(VALUES);
  const form = rng.int(0, 4);
  if (form === 0) return `Nobody gave ${name} to the ${value}.`;
  if (form === 1) return `A ${value} and a ${rng.pick(VALUES)} passed ${name} ${rng.pick(TIMES)}.`;
  if (form === 2)
    return `${capital(rng.pick(PEOPLE))} wrote about ${name}, ${rng.pick(NAMES)} and the ${value}.`;
  if (form === 3) return `The ${value} is older than ${name}.`;
  return `${capital(name)} is far from the ${rng.pick(NAMES)}.`;
}

const number = (rng: Rng): string =>
  rng.chance(0.3) ? `${rng.int(0, 999)}.${rng.int(0, 99)}` : `${rng.int(0, rng.pick([9, 99, 9999, 999999]))}`;

function ledger(rng: Rng): string {
  const cells = Array.from({ length: rng.int(2, 6) }, () => number(rng));
  const form = rng.int(0, 2);
  if (form === 0) return `Row ${rng.int(1, 999)}: ${cells.join(", ")}`;
  if (form === 1) return `| ${cells.join(" | ")} |`;
  return `${rng.int(1900, 2099)}-${rng.int(10, 12)}-${rng.int(10, 28)} ${rng.pick(IDENTS)}=${cells[0]} ${rng.pick(CALLS)} ok`;
}

function code(rng: Rng): string {
  const a = rng.pick(IDENTS);
  const b = `${rng.pick(IDENTS)}${rng.int(0, 9)}`;
  const indent = " ".repeat(2 * rng.int(0, 3));
  const form = rng.int(0, 5);
  if (form === 0) return `${indent}let ${a} = ${rng.pick(CALLS)}(${b}, ${number(rng)});`;
  if (form === 1) return `${indent}if (${a} < ${b}.${rng.pick(IDENTS)}) {`;
  if (form === 2) return `${indent}for ${a} in range(${rng.int(1, 99)}): ${rng.pick(CALLS)}(${b})`;
  if (form === 3) return `${indent}return ${a} + ${b}[${rng.int(0, 63)}]`;
  if (form === 4) return `${indent}# ${rng.pick(CALLS)} the ${a} ${rng.pick(TIMES)}`;
  return `${indent}}`;
}

function jumble(rng: Rng): string {
  const all = rng.chance(0.5) ? IDENTS : rng.chance(0.5) ? NAMES : VALUES;
  return Array.from({ length: rng.int(4, 14) }, () => rng.pick(all)).join(" ");
}

function noise(rng: Rng): string {
  const letters = rng.chance(0.5) ? "0123456789abcdef" : "abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789+/=_-";
  return Array.from({ length: rng.int(8, 48) }, () => letters.charAt(rng.int(0, letters.length - 1))).join(
    "",
  );
}

const STYLES: readonly Style[] = [
  (rng) => ` ${sentence(rng)}`,
  (rng) => ` ${rng.chance(0.3) ? decoy(rng) : sentence(rng)}`,
  (rng) => ` ${decoy(rng)}`,
  (rng) => `\n${ledger(rng)}`,
  (rng) => `\n${code(rng)}`,
  (rng) => `\n${jumble(rng)}`,
  (rng) => `\n${noise(rng)}`,
];

/** Endless generated filler: paragraphs, each of one style, from the few styles that this book mixes. */
export function* generateUnits(rng: Rng): Generator<Unit, never> {
  // Half the books are mostly prose; the rest mix anything.
  const styles = rng.chance(0.5) ? STYLES.slice(0, 3) : rng.shuffle(STYLES).slice(0, rng.int(1, 4));
  for (;;) {
    const style = rng.pick(styles);
    const length = rng.int(2, 9);
    for (let i = 0; i < length; i++) {
      const unit = style(rng);
      yield i === 0 ? `\n\n${unit.trimStart()}` : unit;
    }
  }
}

const LONGEST_UNIT = 240;

/**
 * A given text as units. A unit ends at a line's end or after a sentence's end mark; one that grows past 240
 * characters ends at a word's end, and only a run of 240 characters without any white space is cut inside.
 */
export function splitUnits(text: string): Unit[] {
  const units: Unit[] = [];
  const sentences = text.trimEnd().match(/\s*[^\n]*?(?:[.!?。！？]["'”’)\]]*(?=\s)|(?=\s*\n)|$)/gu) ?? [];
  for (const part of sentences) {
    let rest = part;
    while (rest.length > LONGEST_UNIT) {
      const body = rest.length - rest.trimStart().length;
      let cut = rest.slice(0, LONGEST_UNIT).search(/\s+\S*$/u);
      if (cut <= body) {
        cut = Math.max(LONGEST_UNIT, body + 1);
        // Never between the two halves of a surrogate pair.
        if (/[\ud800-\udbff]/.test(rest.charAt(cut - 1))) cut++;
      }
      units.push(rest.slice(0, cut));
      rest = rest.slice(cut);
    }
    if (rest.trim() !== "") units.push(rest);
  }
  return units;
}
