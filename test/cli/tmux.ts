// A real terminal for tests: a program in a tmux of its own, keys in, screen out.

import { afterAll } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { environment, eventually } from "./program";

export const hasTmux = Bun.which("tmux") !== null;
if (!hasTmux) {
  console.error("!!! SKIPPED: tmux is missing, so nothing is tested in a real terminal: install tmux");
}

export interface Terminal {
  /** Presses keys by tmux's names: Enter, C-c, Up. */
  press(...keys: readonly string[]): void;
  /** Types text as it is. */
  type(text: string): void;
  /** Pastes text as a terminal emulator does, in brackets where the program asked for them. */
  paste(text: string): void;
  /** The lines on the screen that are not empty; long lines are joined. */
  screen(): readonly string[];
  /** Waits until the whole screen matches. */
  shows(pattern: RegExp): Promise<void>;
  /** The process id of the program. */
  childId(): number;
  /** Everything that the program wrote, escape sequences too. */
  readonly logPath: string;
}

const socket = `hypura-test-${process.pid}`;
let count = 0;

function tmux(...args: readonly string[]): string {
  const result = Bun.spawnSync(["tmux", "-u", "-L", socket, ...args], {
    env: { ...environment, TMUX: undefined },
    stderr: "pipe",
  });
  if (!result.success) {
    throw new Error(`tmux ${args[0]} failed: ${result.stderr.toString()}`);
  }
  return result.stdout.toString();
}

afterAll(() => {
  Bun.spawnSync(["tmux", "-L", socket, "kill-server"], { stderr: "ignore" });
});

/** Runs `words` in a terminal; after it a line `status=N` and the state of the terminal (stty -a) appear. */
export function openTerminal(words: readonly string[], folder: string): Terminal {
  const name = `t${count++}`;
  const logPath = join(folder, `${name}.log`);
  const start = join(folder, `${name}.start`);
  const quoted = words.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(" ");
  // It starts when the log is being written, so that the log is complete.
  const script = `while [ ! -e ${start} ]; do sleep 0.02; done; ${quoted}; echo "status=$?"; stty -a; exec cat`;
  tmux("new-session", "-d", "-s", name, "-x", "100", "-y", "50", "sh", "-c", script);
  tmux("pipe-pane", "-t", name, `cat > ${logPath}`);
  writeFileSync(start, "");
  const screen = (): readonly string[] =>
    tmux("capture-pane", "-p", "-J", "-t", name)
      .split("\n")
      .map((line) => line.trimEnd())
      .filter((line) => line !== "");
  return {
    logPath,
    screen,
    childId() {
      const shell = tmux("display-message", "-p", "-t", name, "#{pane_pid}").trim();
      const child = Number(Bun.spawnSync(["pgrep", "-P", shell]).stdout.toString().trim());
      if (!(child > 1)) {
        throw new Error(`the shell ${shell} has no one child`);
      }
      return child;
    },
    press: (...keys) => void tmux("send-keys", "-t", name, ...keys),
    type: (text) => void tmux("send-keys", "-t", name, "-l", text),
    paste(text) {
      const file = join(folder, `${name}.paste`);
      writeFileSync(file, text);
      tmux("load-buffer", "-b", name, file);
      tmux("paste-buffer", "-p", "-d", "-b", name, "-t", name);
    },
    async shows(pattern) {
      await eventually(
        () => (pattern.test(screen().join("\n")) ? true : undefined),
        () => `${pattern} is not on the screen:\n${screen().join("\n")}`,
      );
    },
  };
}
