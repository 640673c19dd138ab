// The chat: what it remembers and what that costs, its commands and files, a pipe as its user, and a person at a
// real terminal (tmux).

import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { open } from "../../src/api";
import {
  askedMessages,
  type Conversation,
  emptyConversation,
  fromFile,
  readInput,
  toFile,
  withTurn,
} from "../../src/chat";
import { PasteFilter } from "../../src/cli/lines";
import {
  endlessModel,
  hypura,
  type Outcome,
  program,
  root,
  scratchFolder,
  smolLm2,
  tinyModel,
} from "./program";
import { hasTmux, openTerminal, type Terminal } from "./tmux";

const folder = scratchFolder();
const tiny = await tinyModel(folder);
const endless = await endlessModel(folder);
const path = (name: string): string => join(folder, name);

describe("what is typed", () => {
  test("is a message, a command, or a mistake", () => {
    expect(readInput("  hello ")).toEqual({ type: "message", text: "hello" });
    expect(readInput(" \n")).toEqual({ type: "nothing" });
    expect(readInput("/quit")).toEqual({ type: "quit" });
    expect(readInput("/CLEAR")).toEqual({ type: "clear" });
    expect(readInput("/save  my talk.json ")).toEqual({ type: "save", path: "my talk.json" });
    expect(readInput("/system Be\nbrief.")).toEqual({ type: "system", text: "Be\nbrief." });
    expect(readInput("/load")).toMatchObject({ type: "mistake" });
    expect(readInput("/foo")).toEqual({
      type: "mistake",
      sentence: "there is no command /foo: /help lists them",
    });
    expect(readInput("/etc/hosts is what?")).toEqual({ type: "message", text: "/etc/hosts is what?" });
  });

  test("keeps pastes together, however they arrive", () => {
    const paste = "one\r\ntwo\rthree\n\tfour \x07\x1b[31mred";
    const bytes = `a\x1b[200~${paste}\x1b[201~b\x1b[Ac`;
    const expected = "aone⏎two⏎three⏎\tfour [31mredb\x1b[Ac";
    for (let cut = 0; cut <= bytes.length; cut++) {
      // A terminal does not part Escape from the bracket of the first mark: alone it is a key.
      if (bytes[cut - 1] === "\x1b" && cut < 5) {
        continue;
      }
      const filter = new PasteFilter();
      expect(filter.feed(bytes.slice(0, cut)) + filter.feed(bytes.slice(cut))).toBe(expected);
    }
    expect(new PasteFilter().restore("one⏎two")).toBe("one\ntwo");
  });

  test("shows a long paste by its size and sends it whole", () => {
    const filter = new PasteFilter();
    const text = "a line of some length\n".repeat(100);
    const shown = filter.feed(`\x1b[200~${text}\x1b[201~`);
    expect(shown).toBe("[paste 1: 100 lines]");
    expect(filter.restore(`Summarise ${shown} please`)).toBe(`Summarise ${text} please`);
    expect(filter.restore("[paste 2: 5 lines]")).toBe("[paste 2: 5 lines]");
  });
});

describe("a conversation", () => {
  const talk: Conversation = withTurn({ system: "Be brief.", messages: [] }, "Hi", "Hello.");

  test("grows by question and answer, and not by a question alone", () => {
    expect(askedMessages(talk, "And?").map(({ role }) => role)).toEqual([
      "system",
      "user",
      "assistant",
      "user",
    ]);
    expect(withTurn(talk, "And?", "")).toBe(talk);
    expect(askedMessages(emptyConversation, "Hi")).toEqual([{ role: "user", content: "Hi" }]);
  });

  test("survives its file", () => {
    expect(fromFile(toFile(talk, "m"), "talk.json")).toEqual(talk);
    expect(fromFile(toFile(emptyConversation, "m"), "talk.json")).toEqual(emptyConversation);
  });

  test("is refused in a sentence when its file is not one", () => {
    const head = '{"format":"hypura-conversation","version":1,"system":null,"messages":';
    for (const [text, says] of [
      ["", /not JSON/],
      ["{", /not JSON/],
      ["[]", /no "format"/],
      ["null", /no "format"/],
      ['{"format":"hypura-conversation","version":2}', /version is 2/],
      ['{"format":"hypura-conversation"}', /version is missing/],
      ['{"format":"hypura-conversation","version":1,"system":5}', /system is neither/],
      [`${head}{}}`, /messages are no list/],
      [`${head}[{"role":"user"}]}`, /message 1 has no content/],
      [`${head}[null]}`, /message 1 has no content/],
      [`${head}[{"role":"assistant","content":"x"}]}`, /message 1 is of "assistant" where user/],
      [`${head}[{"role":"user","content":"x"}]}`, /no answer/],
    ] as const) {
      expect(() => fromFile(text, "talk.json")).toThrow(says);
    }
  });
});

describe("what is known is not evaluated again", () => {
  test("a second turn costs its own tokens", async () => {
    const model = await smolLm2();
    if (model === null) {
      return;
    }
    await using loaded = await open(model, { contextTokens: 1024, threads: 1 });
    const first = "Name three colours and say in one sentence what each of them is good for.";
    const once = await loaded.chat(first, { temperature: 0, maxTokens: 40 }).answer();
    const talk = withTurn(emptyConversation, first, once.text);
    const again = await loaded
      .chat(askedMessages(talk, "Thanks."), { temperature: 0, maxTokens: 4 })
      .answer();
    const known = once.timings.promptTokens + once.timings.generatedTokens;
    expect(once.timings.cachedTokens).toBe(0);
    expect(again.timings.cachedTokens).toBeGreaterThanOrEqual(known - 2);
    expect(again.timings.promptTokens).toBeLessThan(20);
  });

  test("also with a model of noise: the first prompt stays known", async () => {
    await using loaded = await open(tiny, { threads: 1 });
    const once = await loaded.chat("Hello there", { temperature: 0, maxTokens: 8 }).answer();
    const talk = withTurn(emptyConversation, "Hello there", once.text);
    const again = await loaded.chat(askedMessages(talk, "More"), { temperature: 0, maxTokens: 2 }).answer();
    expect(again.timings.cachedTokens).toBeGreaterThanOrEqual(once.timings.promptTokens - 1);
  });
});

describe("by pipe", () => {
  const chat = (lines: readonly string[], ...args: readonly string[]): Promise<Outcome> =>
    hypura(["run", endless, "--interactive", "--temp", "0", "--threads", "1", ...args], {
      stdin: lines.map((line) => `${line}\n`).join(""),
    });

  test("a line is a message, and stdout has the answers alone", async () => {
    const outcome = await chat(["hi", "", "more"], "--max-tokens", "5");
    expect(outcome.status).toBe(0);
    expect(outcome.stderr).toMatch(
      /^5 tokens.*stopped at --max-tokens\n5 tokens.*\(\d+ known\), stopped at --max-tokens\n$/,
    );
    expect(outcome.stdout.trim()).not.toBe("");
    const alone = await hypura([
      "run",
      endless,
      "--prompt",
      "hi",
      "--temp",
      "0",
      "--threads",
      "1",
      "--max-tokens",
      "5",
    ]);
    expect(outcome.stdout.startsWith(alone.stdout)).toBe(true);
  });

  test("--prompt is the first message, --system stands before it", async () => {
    const file = path("first.json");
    await chat(
      [`/save ${file}`],
      "--prompt",
      "/help is no command here",
      "--system",
      "Be brief.",
      "--max-tokens",
      "3",
    );
    const { system, messages } = fromFile(readFileSync(file, "utf8"), file);
    expect([system, messages[0]?.content]).toEqual(["Be brief.", "/help is no command here"]);
  });

  test("saves and goes on later", async () => {
    const file = path("talk.json");
    const before = await chat(
      ["/system Be kind.", "hi", `/save ${file}`, "/quit", "never read"],
      "--max-tokens",
      "4",
    );
    expect(before.stderr).toContain(`2 messages saved in "${file}"`);
    expect(before.status).toBe(0);
    const saved = fromFile(readFileSync(file, "utf8"), file);
    expect(saved.system).toBe("Be kind.");
    expect(saved.messages.map(({ role }) => role)).toEqual(["user", "assistant"]);
    const after = await chat([`/load ${file}`, "/system", "more", `/save ${file}`], "--max-tokens", "4");
    expect(after.stderr).toContain("2 messages loaded");
    expect(after.stderr).toContain("system: Be kind.");
    const { messages } = fromFile(readFileSync(file, "utf8"), file);
    expect(messages.slice(0, 2)).toEqual([...saved.messages]);
    expect(messages[2]).toEqual({ role: "user", content: "more" });
    expect(readdirSync(folder).filter((name) => name.endsWith(".tmp"))).toEqual([]);
  });

  test("says in a line what is wrong, and goes on", async () => {
    const foreign = path("letter.txt");
    writeFileSync(foreign, "Dear reader");
    const outcome = await chat(
      [
        "/foo",
        "/save",
        `/save ${path("no/such/folder.json")}`,
        `/save ${foreign}`,
        `/load ${path("none.json")}`,
        `/load ${foreign}`,
        `/load ${folder}`,
        "hi",
      ],
      "--max-tokens",
      "2",
    );
    const lines = outcome.stderr.trimEnd().split("\n");
    expect(lines).toHaveLength(8);
    for (const [i, says] of [
      /no command \/foo: \/help/,
      /needs the name of a file/,
      /was not saved: there is no such file or folder, check/,
      /exists and is no saved conversation: choose another name/,
      /was not loaded: there is no such file/,
      /is no conversation that \/save wrote: it is not JSON/,
      /is no saved conversation: give/,
      /^2 tokens/,
    ].entries()) {
      expect(lines[i]).toMatch(says);
    }
    expect(readFileSync(foreign, "utf8")).toBe("Dear reader");
    expect(existsSync(path("no"))).toBe(false);
    expect(outcome.status).toBe(6); // of the last error: a script should learn of it
  });

  test("says when the context is full, and /clear helps", async () => {
    const outcome = await chat(
      ["hi", "a longer message than fits, ".repeat(20), "/clear", "hi"],
      "--context",
      "256",
      "--max-tokens",
      "300",
    );
    const lines = outcome.stderr.trimEnd().split("\n");
    expect(lines[1]).toMatch(/^warning: the context of 256 tokens is full: .*\/clear starts anew.*--context/);
    expect(lines[2]).toMatch(/^error: the context is full, \d+ tokens for 256: .*\/clear/);
    expect(lines[3]).toBe("the conversation is forgotten");
    expect(lines[4]).toMatch(/^\d+ tokens at/);
    expect(outcome.status).toBe(6);
  });
});

describe.skipIf(!hasTmux)("at a terminal", () => {
  const openChat = (...args: readonly string[]): Terminal =>
    openTerminal(
      [...program, "run", endless, "--temp", "0", "--threads", "1", "--context", "60160", ...args],
      folder,
    );

  /** Once the program has ended: its status, and a terminal as it was. */
  async function expectEnd(terminal: Terminal, status: number): Promise<void> {
    await terminal.shows(new RegExp(`status=${status}\\n`));
    const state = terminal.screen().join("\n");
    expect(state).toMatch(/[^-]icanon/);
    expect(state).toMatch(/[^-]echo /);
    const log = readFileSync(terminal.logPath, "latin1");
    expect(log).toContain("\x1b[?2004h");
    expect(log.lastIndexOf("\x1b[?2004l")).toBeGreaterThan(log.lastIndexOf("\x1b[?2004h"));
  }

  test("a person talks, pastes, interrupts, saves, and leaves", async () => {
    const terminal = openChat();
    const file = path("person.json");
    await terminal.shows(/60,160 tokens of context\n\/help lists.*\n> ?$/);

    terminal.type("Tell me a stroy");
    terminal.press("BSpace", "BSpace", "BSpace");
    terminal.type("ory");
    terminal.press("Enter");
    await terminal.shows(/[\s\S]{800}/);
    terminal.press("C-c");
    await terminal.shows(/tokens at .*, stopped by Ctrl-C\n> ?$/);

    terminal.paste("first line\nsecond line\n\nlast");
    await terminal.shows(/> first line⏎second line⏎⏎last$/);
    terminal.press("Enter");
    await terminal.shows(/⏎last\n[\s\S]{300}/);
    terminal.type("typed ahead and dropped by Ctrl-C");
    terminal.press("C-c");
    await terminal.shows(/last\n[\s\S]*stopped by Ctrl-C\n> ?$/);

    terminal.type("/foo");
    terminal.press("Enter");
    await terminal.shows(/no command \/foo: \/help lists them\n> ?$/);
    terminal.press("Up", "Up");
    await terminal.shows(/> first line⏎second line⏎⏎last$/);
    terminal.press("C-c");
    await terminal.shows(/last\^C\n> ?$/);
    terminal.type(`/save ${file}`);
    terminal.press("Enter");
    await terminal.shows(/4 messages saved/);
    terminal.press("C-c");
    await expectEnd(terminal, 130);

    const { messages } = fromFile(readFileSync(file, "utf8"), file);
    expect(messages[0]?.content).toBe("Tell me a story");
    expect(messages[2]?.content).toBe("first line\nsecond line\n\nlast");
    expect(messages[1]?.content.length).toBeGreaterThan(100);
  });

  test("/help, /quit and Ctrl-D", async () => {
    const terminal = openChat("--max-tokens", "5");
    await terminal.shows(/> ?$/);
    terminal.type("/help");
    terminal.press("Enter");
    await terminal.shows(/\/save FILE +keep the conversation[\s\S]*> ?$/);
    terminal.type("hi");
    terminal.press("Enter");
    await terminal.shows(/5 tokens at .*stopped at --max-tokens\n> ?$/);
    terminal.type("/quit");
    terminal.press("Enter");
    await expectEnd(terminal, 0);

    const other = openChat();
    await other.shows(/> ?$/);
    other.press("C-d");
    await expectEnd(other, 0);
  });

  test("Ctrl-Z stops it and fg goes on", async () => {
    const terminal = openTerminal(["bash", "--norc", "-i"], folder);
    terminal.type(`${program.join(" ")} run ${endless} --temp 0 --threads 1 --max-tokens 5`);
    terminal.press("Enter");
    await terminal.shows(/Ctrl-D leaves\n> ?$/);
    terminal.type("abc");
    await terminal.shows(/> abc$/);
    terminal.press("C-z");
    await terminal.shows(/Stopped/);
    terminal.type("fg");
    terminal.press("Enter");
    await terminal.shows(/fg\n.*\n> abc$/);
    terminal.type("def");
    await terminal.shows(/> abcdef$/);
    terminal.press("Enter");
    await terminal.shows(/5 tokens.*\n> ?$/);
    terminal.press("C-d");
    await terminal.shows(/bash.*[$#]$/);
  });

  test("a signal from outside leaves the terminal as it was", async () => {
    const terminal = openChat();
    await terminal.shows(/> ?$/);
    terminal.type("go on");
    terminal.press("Enter");
    await terminal.shows(/[\s\S]{800}/);
    process.kill(terminal.childId(), "SIGTERM");
    await expectEnd(terminal, 143);
  });

  test("thinking is dimmed here, and no model steers the screen", async () => {
    const script = path("thinking.ts");
    writeFileSync(
      script,
      `import { showAnswer } from ${JSON.stringify(join(root, "src", "cli", "answer.ts"))};
const answer = { text: "", thinking: "", finish: "stop", timings: {} };
async function* pieces() {
  yield { type: "thinking", text: "Let me " };
  yield { type: "thinking", text: "think." };
  yield { type: "text", text: "\\x1b[2JBlue." };
  yield { type: "end", answer };
}
await showAnswer(pieces());
console.log();
`,
    );
    const terminal = openTerminal([process.execPath, script], folder);
    await terminal.shows(/Let me think\.\n\\x1b\[2JBlue\.\nstatus=0/);
    expect(readFileSync(terminal.logPath, "latin1")).toContain("\x1b[2mLet me \x1b[22m");
    const plain = openTerminal(["env", "NO_COLOR=1", process.execPath, script], folder);
    await plain.shows(/Let me think\.\n[\s\S]*status=0/);
    expect(readFileSync(plain.logPath, "latin1")).not.toContain("\x1b[2m");
    const piped = Bun.spawnSync([process.execPath, script]);
    expect([piped.stdout.toString(), piped.stderr.toString()]).toEqual(["\x1b[2JBlue.\n", ""]);
  });
});
