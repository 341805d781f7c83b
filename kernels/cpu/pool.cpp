// One job at a time: its tasks are counted up, by its caller and by workers that entered it.
//
//     state_   generation (32 bits) | seats (16) | inside (16)
//
//     caller   writes the job; state_ = (generation + 1, seats, 0); takes tasks; seats = 0;
//              waits until inside = 0
//     worker   waits for a generation with seats; seats - 1, inside + 1; takes tasks; inside - 1
//
// So the job is read only between entering and leaving, and written only when nobody can be inside.
//
// A step of the engine is hundreds of jobs a few microseconds apart, and then there is none for a
// while. Who waits spins first, then lets others run (on a shared machine the one waited for may
// need this very core), then sleeps.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <initializer_list>
#include <mutex>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace everstep {
namespace {

constexpr int kSpins = 1000;   // a pause each: tens of microseconds
constexpr int kYields = 500;   // hundreds of microseconds where no one else wants the core
constexpr int kMaxWorkers = 1023;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `condition` came to hold before the patience ended.
template <class Condition>
bool watch(const Condition& condition) {
    for (int i = 0; i < kSpins; ++i) {
        if (condition()) return true;
        relax();
    }
    for (int i = 0; i < kYields; ++i) {
        if (condition()) return true;
        sched_yield();
    }
    return condition();
}

class Pool {
  public:
    // False, and nothing done, while another call has the workers.
    bool run(std::int64_t tasks, int threads, TaskFunction function, const void* context) {
        if (is_taken_.exchange(true)) return false;
        const int seats = hire(std::min(threads - 1, kMaxWorkers));
        function_ = function;
        context_ = context;
        tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        const std::uint64_t generation = (state_.load() >> 32) + 1;
        state_.store(generation << 32 | static_cast<std::uint64_t>(seats) << 16);
        wake(seats);
        take_tasks();
        state_.fetch_and(~kSeats);
        wait_for_workers();
        is_taken_.store(false);
        return true;
    }

  private:
    static constexpr std::uint64_t kInside = 0xffff, kSeats = kInside << 16, kSeat = 1u << 16;

    void take_tasks() {
        for (std::int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
            function_(context_, task);
    }

    // -- the caller's side

    // Up to `wanted` workers; fewer where the system refuses a thread.
    int hire(int wanted) {
        if (workers_ < wanted) {
            // signals are for the threads of the host: Python's main thread must wake from them; but
            // what a worker itself does wrong is its own, and blocked it would end the process unsaid
            sigset_t blocked, before;
            sigfillset(&blocked);
            for (const int own : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}) sigdelset(&blocked, own);
            pthread_sigmask(SIG_SETMASK, &blocked, &before);
            pthread_attr_t detached;
            pthread_attr_init(&detached);
            pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
            pthread_t thread;
            while (workers_ < wanted && pthread_create(&thread, &detached, start, this) == 0)
                ++workers_;
            pthread_attr_destroy(&detached);
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
        return std::min(workers_, wanted);
    }

    // Enough sleepers to fill the seats with those who are awake.
    void wake(int seats) {
        if (workers_ - sleepers_.load() >= seats) return;
        int count;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            count = std::min(seats - (workers_ - sleepers_.load()), sleepers_.load());
            sleepers_ -= count;
            calls_ += count;
        }
        for (int i = 0; i < count; ++i) called_.notify_one();
    }

    void wait_for_workers() {
        const auto is_done = [&] { return (state_.load() & kInside) == 0; };
        if (watch(is_done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        caller_sleeps_.store(true);
        left_.wait(lock, is_done);
        caller_sleeps_.store(false);
    }

    // -- a worker's side

    static void* start(void* pool) {
#if defined(__linux__)
        pthread_setname_np(pthread_self(), "everstep-worker");
#endif
        static_cast<Pool*>(pool)->work();
        return nullptr;
    }

    [[noreturn]] void work() {
        std::uint64_t generation = 0;  // the last one that this worker entered
        for (;;) {
            std::uint64_t state = 0;
            const auto has_seat = [&] {
                state = state_.load();
                return (state & kSeats) != 0 && state >> 32 != generation;
            };
            if (!watch(has_seat)) {
                sleep(has_seat);
                continue;
            }
            if (!state_.compare_exchange_strong(state, state - kSeat + 1)) continue;
            generation = state >> 32;
            take_tasks();
            if ((state_.fetch_sub(1) & kInside) == 1 && caller_sleeps_.load()) {
                const std::lock_guard<std::mutex> lock(mutex_);
                left_.notify_one();
            }
        }
    }

    template <class Condition>
    void sleep(const Condition& has_seat) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        if (has_seat()) {
            // the caller may have counted this worker as awake
            --sleepers_;
            return;
        }
        called_.wait(lock, [&] { return calls_ > 0; });
        --calls_;
    }

    std::atomic<bool> is_taken_{false};
    alignas(64) std::atomic<std::uint64_t> state_{0};
    alignas(64) std::atomic<std::int64_t> next_{0};
    // the job
    alignas(64) TaskFunction function_ = nullptr;
    const void* context_ = nullptr;
    std::int64_t tasks_ = 0;
    int workers_ = 0;  // written by callers only, one at a time
    // sleep
    std::mutex mutex_;
    std::condition_variable called_, left_;
    std::atomic<int> sleepers_{0};  // not called yet
    int calls_ = 0;                 // not answered yet
    std::atomic<bool> caller_sleeps_{false};
};

// Never freed: workers outlive whatever the end of a process destroys.
Pool* pool = new Pool;

// The parent's workers, and whatever they held, do not exist in a child.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void share_tasks(std::int64_t tasks, int threads, TaskFunction function, const void* context) {
    (void)fork_handler;
    if (pool->run(tasks, threads, function, context)) return;
    for (std::int64_t task = 0; task < tasks; ++task) function(context, task);
}

}  // namespace everstep
