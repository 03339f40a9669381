/**
 * Long-context tasks in the manner of RULER: books that hide facts, and questions about them. The demo asks them and
 * the demo model was trained on what these functions write, so the two cannot drift apart.
 */
export { type Book, type BookOptions, chooseQuestions, LEAST_TOKENS, makeBook } from "./book.ts";
export { grade, KINDS, type Kind, type Question } from "./facts.ts";
export { Rng } from "./rng.ts";
export { COUNTS, LONE, NAMES, VALUES } from "./words.ts";
