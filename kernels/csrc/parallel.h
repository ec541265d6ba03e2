// A parallel loop with dynamic schedule on std::thread.
//
// Threads start per call (some tens of microseconds each): no pool of ours competes with torch's,
// survives a fork, or has to be shipped. Work below about 1 ms should ask for one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fquant {

// Calls body(worker, index) for every index in [0, count), worker < threads. The body must not
// throw and may not depend on which worker it runs on.
template <class Body>
void parallel_for(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    for (int64_t i = next++; i < count; i = next++) body(worker, i);
  };
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < threads && worker < count; ++worker) {
    try {
      others.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the ones there are do all the work
    }
  }
  work(0);
  for (auto& thread : others) thread.join();
}

}  // namespace fquant
