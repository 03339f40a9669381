#!/usr/bin/env node
// The command `freekv`. Its commands, flags and output are in cli/.
import { main } from "./cli/main.ts";

process.exit(await main(process.argv.slice(2)));
