// The one error class of hypura. It owns the codes by which the rest of the program tells failures apart and
// the exit status of each. It knows nothing about where an error is printed (main.ts) or how it becomes an HTTP
// status (server.ts). A message is one sentence that says what, where, how much and what to do.

/**
 * | code               | meaning                                                  | exit status |
 * |--------------------|----------------------------------------------------------|-------------|
 * | usage              | a flag or an argument is wrong                           | 2           |
 * | not-found          | a file that was named does not exist                     | 3           |
 * | not-a-model        | the file is no GGUF model at all                         | 4           |
 * | corrupt-model      | a GGUF whose bytes contradict themselves or are missing  | 4           |
 * | unsupported-model  | a sound GGUF that this version cannot run                | 4           |
 * | not-enough-memory  | the plan does not fit the memory of the machine          | 5           |
 * | engine             | the native engine failed                                 | 6           |
 * | request            | a request was refused or failed                          | 6           |
 * | io                 | the system refused or failed a read or a write           | 6           |
 * | internal           | a mistake in hypura itself                               | 70          |
 * | cancelled          | stopped by the user                                      | 130         |
 *
 * 70 is EX_SOFTWARE of sysexits.h; 130 is 128 + SIGINT, what a shell reports for Ctrl-C.
 */
export type ErrorCode =
  | "usage"
  | "not-found"
  | "not-a-model"
  | "corrupt-model"
  | "unsupported-model"
  | "not-enough-memory"
  | "engine"
  | "request"
  | "io"
  | "internal"
  | "cancelled";

const exitStatuses: Readonly<Record<ErrorCode, number>> = {
  usage: 2,
  "not-found": 3,
  "not-a-model": 4,
  "corrupt-model": 4,
  "unsupported-model": 4,
  "not-enough-memory": 5,
  engine: 6,
  request: 6,
  io: 6,
  internal: 70,
  cancelled: 130,
};

/** The exit status of the process for an error of this code. */
export function exitStatus(code: ErrorCode): number {
  return exitStatuses[code];
}

export class HypuraError extends Error {
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options?: { readonly cause?: unknown }) {
    super(message, options);
    this.name = "HypuraError";
    this.code = code;
  }
}
