// tasks.h - work that needs no engine, by name: hy_task's table.
//
// Owns the translation between a task's JSON and the values of what does the work, the thread that it runs on, and its
// events. The work itself is in measure.* and products.*; a new task is a function in tasks.cpp and a line in its table.
#pragma once

#include <functional>
#include <string_view>

namespace hypura {

class TaskEvents; // tasks.cpp

// A task with its arguments checked, ready to run.
using TaskBody = std::function<void(TaskEvents &)>;

// Throws std::exception when there is no such task or `json` is not what it takes.
TaskBody parse_task(std::string_view name, std::string_view json);

// Runs it on a thread of its own, which closes `fd` at its end. Throws std::system_error when no thread can be had; `fd`
// is closed then too.
void start_task(TaskBody body, int fd);

} // namespace hypura
