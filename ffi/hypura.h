/* hypura.h - the whole contract between TypeScript and native code.
 *
 * Seven functions. None blocks, none throws, none takes a callback: what native code has to say goes, as
 * newline-delimited JSON, into one end of a socket pair, and the caller reads the other end. The caller
 * cancels by closing its end, or by writing one byte to it and reading on: the end of stream then says that the
 * request has left the engine. All integers are plain C; all text is UTF-8; a JSON document is (pointer, length).
 *
 * Life of an engine
 *   hy_open(plan)  -> an engine id and its descriptor. Loading runs on a thread of the engine's own. Events:
 *       {"event":"progress","value":0.42}            fraction of the resident bytes that are loaded
 *       {"event":"log","level":"warn","text":"..."}   what llama.cpp had to say (info, warn, error)
 *       {"event":"warning","text":"..."}             what a person should know and nothing fails for
 *       {"event":"ready","info":{...}}               requests are taken from here on; see engine.cpp, ready_info
 *       {"event":"error","code":"...","message":"..."} loading failed; "closed" follows
 *       {"event":"fatal","message":"..."}            native code asserted; the engine answers nothing more,
 *                                                    the process should say so and end
 *       {"event":"closed"}                           all memory of the engine is given back; end of stream follows
 *   hy_request(engine, route, body) -> a descriptor. The route is a method and a path, as in
 *       "POST /v1/chat/completions"; the body is that route's JSON. Events, in this order:
 *       {"event":"data","data":{...}}                one per chunk (streaming), or one in all. A dialect that names
 *                                                    its chunks adds "name":"..."
 *       {"event":"error","status":400,"error":{"message":"...","type":"..."}}   first and last, or last
 *       {"event":"end"}                              the answer is complete
 *     Then end of stream. The first event decides an HTTP status. A descriptor that ends without "end" or
 *     "error" was cut off.
 *   hy_task(name, json) -> a descriptor with the events of a request. Work that needs no engine: what this machine
 *       is and how fast it is. Names, fields and answers are in tasks.cpp.
 *   hy_close(engine)  starts the end: requests in flight are cancelled, then the engine says "closed".
 *
 * Return codes: >= 0 is a result, < 0 is one of HY_E_*.
 */
#ifndef HYPURA_H
#define HYPURA_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HY_API __attribute__((visibility("default")))
#else
#define HY_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a function, an event or a plan field changes its meaning. */
#define HY_ABI_VERSION 1

enum hy_code {
    HY_E_JSON = -1,     /* a document is not JSON or lacks a field: a programmer's error on the other side */
    HY_E_HANDLE = -2,   /* no such engine, or it is closing */
    HY_E_DESCRIPTOR = -3, /* no descriptor could be made: the process or the system has none left */
    HY_E_LIMIT = -4,    /* as many engines are open as this library holds */
    HY_E_THREAD = -5,   /* no thread could be started */
    HY_E_INTERNAL = -6  /* anything else; a bug here */
};

/* HY_ABI_VERSION of the library. */
HY_API int32_t hy_abi_version(void);

/* Facts about this build as one JSON object, NUL-terminated, valid for the life of the process:
 * {"llama":"0.5.0","build":"...","system":"AVX2 = 1 | ..."}. */
HY_API const char * hy_build_info(void);

/* Opens what the plan (src/plan.ts, type Plan) describes. Stores the caller's descriptor in *fd. Returns the
 * engine's id (>= 1). */
HY_API int64_t hy_open(const uint8_t * plan_json, uint64_t plan_bytes, int32_t * fd);

/* Starts a request on an engine that is ready. Returns the caller's descriptor. */
HY_API int32_t hy_request(int64_t engine, const char * route, const uint8_t * body_json, uint64_t body_bytes);

/* Starts a task. HY_E_JSON also where there is no task of this name. Returns the caller's descriptor. */
HY_API int32_t hy_task(const char * name, const uint8_t * json, uint64_t bytes);

/* Starts the engine's end. Idempotent. Returns 0. */
HY_API int32_t hy_close(int64_t engine);

/* Requests inside the engine (their threads included): 0 when every descriptor given out has been finished. */
HY_API int32_t hy_active_requests(int64_t engine);

#ifdef __cplusplus
}
#endif
#endif
