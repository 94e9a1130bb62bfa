// What is computed is what somebody holds, and nothing is kept that eager frees.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <fstream>

#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Liveness = Lazy;

/// Runs `step` until it has been recorded, interpreted and replayed, and once
/// more after that.
template <class Function>
void in_all_ways(const Function& step) {
  begin_test(/*compile=*/true);
  const Statistics before = statistics();
  for (int k = 0; k < 6; ++k) {
    SCOPED_TRACE(k);
    step(k);
    mark_step();
    wait_for_compiles();
  }
  const Statistics did = since(before);
  EXPECT_GT(did.segments_interpreted, 0u) << explain();
  EXPECT_GT(did.segments_replayed, 0u) << explain();
}

TEST_F(Liveness, DroppedOutputsAreNotMade) {
  in_all_ways([](int) {
    const auto x = torch::ones({4}).to(torch::kLazy);
    torch::Tensor kept;
    {
      const auto dropped = x * 3;
      kept = dropped + 1;
    }
    mark_step();
    EXPECT_EQ(kept.sum().item<float>(), 16.0f);
  });
}

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;
WeakStorage watch(const torch::Tensor& tensor) {
  return WeakStorage(tensor.storage().getWeakStorageImpl());
}

TEST_F(Liveness, NothingLivesAfterTheStep) {
  in_all_ways([](int) {
    std::vector<WeakStorage> all;
    {
      const auto x = torch::ones({4}).to(torch::kLazy).requires_grad_();
      const auto y = (x * 3).exp();
      const auto z = y.relu().sum();
      z.backward();
      for (const auto& tensor : {x, y, z, x.grad()}) all.push_back(watch(tensor));
      mark_step();
    }
    for (const auto& storage : all) EXPECT_TRUE(storage.expired());
  });
}

TEST_F(Liveness, AnInputIsNotKeptAfterItsStep) {
  in_all_ways([](int) {
    auto x = torch::ones({4}).to(torch::kLazy);
    const auto storage = watch(x);
    const auto y = x * 2;
    mark_step();
    x = torch::Tensor();
    EXPECT_TRUE(storage.expired());
    EXPECT_EQ(y.sum().item<float>(), 8.0f);
  });
}

/// The most memory that `function` had resident, above what was before, in MB.
template <class Function>
int64_t peak_megabytes(const Function& function) {
  const auto status = [](const std::string& name) {
    std::ifstream file("/proc/self/status");
    for (std::string line; std::getline(file, line);) {
      if (line.starts_with(name)) return std::stoll(line.substr(name.size() + 1)) / 1024;
    }
    return 0LL;
  };
  std::ofstream("/proc/self/clear_refs") << "5";  // the peak is now
  const auto before = status("VmRSS");
  function();
  return status("VmHWM") - before;
}

/// The most bytes of tensors that there were at once while `function` ran, as libtorch's
/// allocators report them for this thread.
template <class Function>
size_t peak_bytes(const Function& function) {
  struct Peak final : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t, size_t allocated, size_t, c10::Device device) override {
      if (device.type() == eager_device().type()) most = std::max(most, allocated);
    }
    bool memoryProfilingEnabled() const override { return true; }
    size_t most = 0;
  };
  const auto peak = std::make_shared<Peak>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, peak);
  const auto before = torch::empty({1}, eager_device());  // tells what there is
  const size_t first = peak->most;
  function();
  return peak->most - first;
}

TEST_F(Liveness, RandomNumbersOfStepsDoNotPileUp) {
  const auto run = [](torch::Device device) {
    // Steps are found by what lives on.
    const auto drift = torch::full({1}, 0.1).to(device).requires_grad_();
    const torch::NoGradGuard no_grad;
    torch::Tensor mean;
    for (int k = 0; k < 32; ++k) {
      const auto numbers = torch::randn({1024, 512}, torch::device(device));
      auto moved = numbers * drift;
      for (int date = 0; date < 8; ++date) {
        moved = moved * drift;
        moved = moved + numbers;
        moved = moved.tanh();
      }
      mean = moved.mean();
      if (k % 8 == 7) wait_for_compiles();
    }
    return mean.item<double>();
  };
  const size_t eager = peak_bytes([&] { run(eager_device()); });
  begin_test(/*compile=*/true);
  const Statistics before = statistics();
  // Steps are found; recorded, interpreted, compared with the interpreter, replayed.
  const size_t lazy = peak_bytes([&] { run(torch::kLazy); });
  const Statistics did = since(before);
  EXPECT_GT(did.segments_interpreted, 0u) << explain();
  EXPECT_GT(did.segments_replayed, 0u) << explain();
  EXPECT_LE(static_cast<double>(lazy), 1.05 * static_cast<double>(eager));
}

TEST_F(Liveness, IntermediatesAreFreedAsEagerFreesThem) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the host's memory is measured";
  const auto run = [](torch::Device device) {
    const auto x = torch::ones({1 << 24}).to(device);  // 64 MB, never from the heap
    return peak_megabytes([&] {
      auto y = x * 1.01;
      for (int t = 0; t < 20; ++t) y = y * 1.01;
      mark_step();
      EXPECT_GT(y[0].item<float>(), 1.0f);
      mark_step();
    });
  };
  const int64_t eager = run(eager_device());
  for (const char* way : {"recorded", "interpreted", "interpreted again"}) {
    SCOPED_TRACE(way);
    EXPECT_LE(run(torch::kLazy), eager + 64);
  }
}

TEST_F(Liveness, OutputsOfSeveralStepsAreKept) {
  Tensors kept;
  const auto x = torch::ones({3}).to(torch::kLazy);
  in_all_ways([&](int k) {
    x.add_(1);
    kept.push_back(x * 2);
    EXPECT_EQ(kept.size(), static_cast<size_t>(k + 1));
  });
  for (size_t k = 0; k < kept.size(); ++k) {
    EXPECT_TRUE(torch::equal(kept[k].cpu(), torch::full({3}, 2.0f * static_cast<float>(k + 2))));
  }
}

TEST_F(Liveness, AnOutputHeldOnlySometimes) {
  begin_test(/*compile=*/true);
  const auto x = torch::ones({3}).to(torch::kLazy);
  const Statistics before = statistics();
  for (int k = 0; k < 16; ++k) {
    torch::Tensor sometimes, rarely;
    const auto y = x * 2;
    auto z = y + 1;
    if (k % 2 == 0) sometimes = y;
    auto w = (z * z).exp();
    if (k % 5 == 0) rarely = z;
    z = torch::Tensor();
    mark_step();
    wait_for_compiles();
    EXPECT_TRUE(torch::allclose(w.cpu(), torch::full({3}, std::exp(9.0f))));
    if (sometimes.defined()) {
      EXPECT_TRUE(torch::equal(sometimes.cpu(), torch::full({3}, 2.0f)));
    }
    if (rarely.defined()) {
      EXPECT_TRUE(torch::equal(rarely.cpu(), torch::full({3}, 3.0f)));
    }
  }
  const Statistics did = since(before);
  EXPECT_LE(did.programs_requested, 4u) << explain();
  EXPECT_GE(did.segments_replayed, 8u) << explain();
}

TEST_F(Liveness, InputsMayGoBeforeTheStepRuns) {
  in_all_ways([](int k) {
    torch::Tensor y;
    {
      const auto x = torch::full({4}, static_cast<float>(k)).to(torch::kLazy);
      y = x * 2 + 1;
    }
    EXPECT_EQ(y.sum().item<float>(), 8.0f * static_cast<float>(k) + 4);
  });
}

TEST_F(Liveness, OnlyAViewIsHeld) {
  in_all_ways([](int) {
    const auto x = torch::arange(6).to(torch::kLazy).to(torch::kFloat);
    torch::Tensor view;
    {
      const auto y = x * 2;
      view = y.view({2, 3})[1];
    }
    mark_step();
    EXPECT_EQ(view.sum().item<float>(), 24.0f);
    view.add_(1);
    EXPECT_EQ(view.sum().item<float>(), 27.0f);
  });
}

TEST_F(Liveness, AnOutputIsAnInputWritten) {
  auto state = torch::ones({3}).to(torch::kLazy);
  in_all_ways([&](int k) {
    state = state.mul_(2);
    const auto alias = state.detach();
    mark_step();
    EXPECT_EQ(alias.sum().item<float>(), 3 * std::pow(2.0f, static_cast<float>(k + 1)));
  });
}

TEST_F(Liveness, ATensorReassignedInALoopIsAChainOfSteps) {
  auto x = torch::ones({3}).to(torch::kLazy);
  in_all_ways([&](int) { x = x + 1; });
  EXPECT_EQ(x.sum().item<float>(), 21.0f);
}

TEST_F(Liveness, APendingTensorDropsWithTheProgramThatNeverReadsIt) {
  for (int k = 0; k < 4; ++k) {
    const auto x = torch::ones({3}).to(torch::kLazy);
    (void)(x * 2 + 1);  // nobody looks
    mark_step();
  }
}

TEST_F(Liveness, OutputsOfAProgramMayBeWrittenLater) {
  in_all_ways([](int) {
    const auto x = torch::ones({4}).to(torch::kLazy);
    const auto a = x + 1, b = x + 1;  // equal, and not one tensor
    mark_step();
    a.zero_();
    EXPECT_EQ(b.sum().item<float>(), 8.0f);
    EXPECT_EQ(x.sum().item<float>(), 4.0f);
    const auto c = x.clone(), d = x * 1;
    mark_step();
    c.add_(5);
    d.add_(7);
    EXPECT_EQ(x.sum().item<float>(), 4.0f);
    EXPECT_EQ(c.sum().item<float>(), 24.0f);
    EXPECT_EQ(d.sum().item<float>(), 32.0f);
  });
}

}  // namespace
}  // namespace reprise::test
