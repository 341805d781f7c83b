// The threads of this process, as parallel() in common.h needs them.
#pragma once

#include <cstdint>

namespace everstep {

using TaskFunction = void (*)(const void* context, std::int64_t task);

// Calls function(context, task) once for each task in [0, tasks) and returns when all are done.
//
// The caller and up to threads - 1 workers take one task after another. Which of them come, and
// when, decides only who runs a task: a worker that the system has put aside is not waited for,
// unless it was put aside inside a task. Workers are made at first need and stay. Calls from
// several threads at once, and from inside a task, are fine: while the workers are taken, a caller
// runs its tasks alone. A child of fork() has workers of its own. Throws nothing.
void share_tasks(std::int64_t tasks, int threads, TaskFunction function, const void* context);

}  // namespace everstep
