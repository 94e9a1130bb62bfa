/// \file
/// The lock of a session: taken by its own thread at every op, by another thread
/// only to complete what is pending there. Uncontended, it costs one exchange.
#pragma once

#include <atomic>
#include <thread>

namespace reprise {

class SessionLock {
 public:
  void lock() {
    while (taken_.exchange(true, std::memory_order_acquire)) wait();
  }
  bool try_lock() { return !taken_.exchange(true, std::memory_order_acquire); }
  void unlock() { taken_.store(false, std::memory_order_release); }

 private:
  void wait() {
    // Its holder may be running a whole program: do not burn a core.
    for (int k = 0; taken_.load(std::memory_order_relaxed); ++k) {
      if (k < 64) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
  }
  std::atomic<bool> taken_{false};
};

}  // namespace reprise
