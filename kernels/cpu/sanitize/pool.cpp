// A program for sanitizers: jobs of every size, from several threads at once, nested, after sleep,
// and in a child process. Counts each task.
#include "../pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using everstep::share_tasks;

namespace {

// Every task of one job once, and what the tasks wrote is seen by the caller.
void count(std::int64_t tasks, int threads) {
    std::vector<int> done(static_cast<std::size_t>(tasks));
    share_tasks(
        tasks, threads,
        [](const void* context, std::int64_t task) {
            ++(*static_cast<std::vector<int>*>(const_cast<void*>(context)))[static_cast<std::size_t>(task)];
        },
        &done);
    for (int times : done)
        if (times != 1) {
            std::puts("pool: a task was not run once");
            std::abort();
        }
}

void jobs(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        count(round % 37, 1 + round % 5);
        // long enough for workers to begin to yield, now and then to sleep
        if (round % 64 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(round % 128 ? 1 : 5));
    }
}

void nested() {
    static std::atomic<int> inner{0};
    inner = 0;
    share_tasks(
        8, 3,
        [](const void*, std::int64_t) {
            share_tasks(
                5, 3, [](const void*, std::int64_t) { ++inner; }, nullptr);
        },
        nullptr);
    if (inner != 40) std::abort();
}

}  // namespace

int main() {
    jobs(2000);
    nested();
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back(jobs, 1000);
    for (std::thread& caller : callers) caller.join();
    const pid_t child = fork();
    if (child == 0) {
        jobs(200);
        _exit(0);
    }
    int status = 1;
    if (waitpid(child, &status, 0) != child || status != 0) return 1;
    jobs(200);
    std::puts("pool: done");
    return 0;
}
