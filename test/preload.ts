// Before any test file: what hypura keeps between runs is kept in the tree's build folder, so that no test writes into
// the home of who runs it. The measured machine stays there from one test run to the next; the runs that tests made go.

import { rmSync } from "node:fs";
import { join } from "node:path";

const home = join(import.meta.dir, "..", "build", "test-home");
process.env["HYPURA_HOME"] ??= home;
rmSync(join(home, "history.json"), { force: true });
