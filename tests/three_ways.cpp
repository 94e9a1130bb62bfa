#include "tests/three_ways.h"

#include <cstring>
#include <limits>

#include "reprise/reprise.h"
#include "reprise/testing.h"

namespace reprise::test {
namespace {

struct Tolerance {
  double relative, absolute;
};

Tolerance tolerance_of(torch::Dtype dtype) {
  switch (dtype) {
    case torch::kHalf:
      return {1e-3, 1e-3};
    case torch::kBFloat16:
      return {1.6e-2, 1e-2};
    case torch::kDouble:
    case torch::kComplexDouble:
      return {1e-7, 1e-7};
    case torch::kFloat:
    case torch::kComplexFloat:
      return {1e-5, 1e-5};
    default:
      return {0, 0};
  }
}

/// On the host, without a trace of it in the segment.
torch::Tensor on_host(const torch::Tensor& tensor) {
  torch::NoGradGuard no_grad;
  return tensor.cpu();
}

Tensors copies(const Tensors& tensors) {
  Tensors out;
  for (const auto& tensor : tensors) {
    out.push_back(tensor.defined() ? on_host(tensor).clone() : tensor);
  }
  return out;
}

std::string describe(const torch::Tensor& tensor) {
  return c10::str(tensor.dtype(), tensor.sizes(), " strides ", tensor.strides(), " offset ",
                  tensor.storage_offset());
}

class Comparison {
 public:
  Comparison(const Program& program, const Ways& ways) : ways_(ways) {
    // Interpreted and queued; the first run; then perhaps disturbed runs; twice compiled.
    const int count = ways.repeats_at + 2 + (ways.compiled ? 4 + kMostDisturbed : 0);
    torch::manual_seed(kSeed);
    const Step eager = program(eager_device());
    for (int k = 0; k < count; ++k) {
      torch::manual_seed(kSeed + 1 + k);
      const Tensors outputs = eager(k);
      geometry_.emplace_back();
      for (const auto& output : outputs) {
        geometry_.back().push_back(output.defined() ? output.detach() : output);
      }
      expected_.push_back(copies(outputs));
      random_state_.push_back(random_state());
    }
    torch::manual_seed(kSeed);
    lazy_ = program(torch::kLazy);
    mark_step();
  }

  void run() {
    const int recorded_until = ways_.repeats_at;
    for (int k = 0; k < recorded_until; ++k) {
      const Statistics did = step("recorded", /*exact=*/true);
      EXPECT_GT(did.ops_recorded, 0u);
      EXPECT_EQ(did.segments_replayed, 0u);
    }
    {
      const Statistics did = step("interpreted", /*exact=*/true);
      EXPECT_EQ(did.ops_recorded, 0u) << explain();
      EXPECT_EQ(did.mismatches, 0u) << explain();
      EXPECT_GT(did.ops_verified, 0u);
      EXPECT_GT(did.segments_interpreted, 0u);
      EXPECT_EQ(did.segments_replayed, 0u);
    }
    {
      reprise::testing::pause_recording(std::numeric_limits<uint32_t>::max());
      const Statistics did = step("not recorded", /*exact=*/true);
      EXPECT_EQ(did.ops_recorded + did.ops_verified, 0u) << explain();
      reprise::testing::pause_recording(0);
    }
    if (!ways_.compiled) return;
    options().compile = true;
    {
      const Statistics did = step("interpreted and queued", /*exact=*/true);
      EXPECT_EQ(did.ops_recorded, 0u) << explain();
      EXPECT_GT(did.programs_requested, 0u) << explain();
    }
    wait_for_compiles();
    // The program's first run: what it gives is compared with the interpreter's values,
    // which are the ones that count. Disturbed runs of the interpreter may follow.
    bool checked = false;
    for (int k = 0; k <= kMostDisturbed && !checked; ++k) {
      const Statistics did = step("being checked", /*exact=*/k == 0);
      EXPECT_EQ(did.ops_recorded, 0u) << explain();
      EXPECT_EQ(did.program_failures, 0u) << explain();
      checked = did.programs_checked > 0;
    }
    EXPECT_TRUE(checked) << explain();
    for (int k = 0; k < 2; ++k) {
      const Statistics did = step("compiled", /*exact=*/false);
      EXPECT_EQ(did.ops_recorded, 0u) << explain();
      EXPECT_EQ(did.segments_interpreted, 0u) << explain();
      EXPECT_GT(did.segments_replayed, 0u) << explain();
    }
    options().compile = false;
  }

 private:
  static constexpr uint64_t kSeed = 7;
  static constexpr int kMostDisturbed = 4;

  static torch::Tensor random_state() {
    auto generator = at::globalContext().defaultGenerator(eager_device());
    const std::lock_guard lock(generator.mutex());
    return generator.get_state();
  }

  Statistics step(const char* way, bool exact) {
    const auto k = static_cast<size_t>(iteration_);
    SCOPED_TRACE(c10::str("iteration ", k, ", ", way));
    torch::manual_seed(kSeed + 1 + iteration_);
    const Statistics before = statistics();
    {
      const Tensors outputs = lazy_(iteration_);
      mark_step();
      EXPECT_EQ(outputs.size(), expected_[k].size());
      for (size_t o = 0; o < outputs.size() && o < expected_[k].size(); ++o) {
        SCOPED_TRACE(c10::str("output ", o));
        compare(outputs[o], expected_[k][o], geometry_[k][o], exact);
      }
    }
    EXPECT_TRUE(torch::equal(random_state(), random_state_[k]))
        << "other random numbers were drawn than by eager";
    ++iteration_;
    return since(before);
  }

  void compare(const torch::Tensor& actual, const torch::Tensor& expected,
               const torch::Tensor& geometry, bool exact) const {
    ASSERT_EQ(actual.defined(), expected.defined());
    if (!actual.defined()) return;
    // Strides are eager's in every way: user code may ask for them.
    EXPECT_EQ(describe(actual), describe(geometry));
    if (exact) {
      expect_same_bits(actual, expected);
    } else {
      expect_close(actual, expected, ways_.tolerance);
    }
  }

  const Ways ways_;
  Step lazy_;
  std::vector<Tensors> expected_, geometry_;
  Tensors random_state_;
  int iteration_ = 0;
};

}  // namespace

void expect_same_bits(const torch::Tensor& actual, const torch::Tensor& expected) {
  const auto a = on_host(actual).resolve_conj().resolve_neg().contiguous();
  const auto e = on_host(expected).resolve_conj().resolve_neg().contiguous();
  ASSERT_EQ(a.sizes(), e.sizes());
  ASSERT_EQ(a.dtype(), e.dtype());
  const bool same = a.nbytes() == 0 || std::memcmp(a.data_ptr(), e.data_ptr(), a.nbytes()) == 0;
  EXPECT_TRUE(same) << "lazy:\n" << a.flatten().slice(0, 0, 16) << "\neager:\n"
                    << e.flatten().slice(0, 0, 16);
}

void expect_close(const torch::Tensor& actual, const torch::Tensor& expected, double tolerance) {
  const auto a = on_host(actual).resolve_conj().resolve_neg();
  const auto e = on_host(expected).resolve_conj().resolve_neg();
  ASSERT_EQ(a.sizes(), e.sizes());
  ASSERT_EQ(a.dtype(), e.dtype());
  const Tolerance own = tolerance_of(a.scalar_type());
  EXPECT_TRUE(torch::allclose(a, e, own.relative * tolerance, own.absolute * tolerance,
                              /*equal_nan=*/true))
      << "largest difference "
      << (a.is_floating_point() ? (a - e).abs().max().item<double>() : -1.0) << "\nlazy:\n"
      << a.flatten().slice(0, 0, 16) << "\neager:\n"
      << e.flatten().slice(0, 0, 16);
}

Statistics since(const Statistics& before) {
  Statistics now = statistics();
  now.ops_recorded -= before.ops_recorded;
  now.ops_verified -= before.ops_verified;
  now.ops_inferred -= before.ops_inferred;
  now.segments_recorded -= before.segments_recorded;
  now.segments_interpreted -= before.segments_interpreted;
  now.segments_replayed -= before.segments_replayed;
  now.segments_forgotten -= before.segments_forgotten;
  now.mismatches -= before.mismatches;
  now.programs_requested -= before.programs_requested;
  now.programs_compiled -= before.programs_compiled;
  now.programs_loaded -= before.programs_loaded;
  now.programs_shared -= before.programs_shared;
  now.compile_failures -= before.compile_failures;
  now.programs_checked -= before.programs_checked;
  now.program_failures -= before.program_failures;
  now.programs_demoted -= before.programs_demoted;
  now.cuda_graphs -= before.cuda_graphs;
  now.cuda_graph_replays -= before.cuda_graph_replays;
  return now;
}

void begin_test(bool compile) {
  mark_step();
  wait_for_compiles();
  reprise::testing::forget_traces();
  options().compile = compile;
  options().compile_after_ops = 1;
  options().demote_slow_programs = false;
  options().find_steps = true;
  options().dynamic_shapes = false;  // tests share traces, and should not share programs
  options().trace_bytes = Options().trace_bytes;
  options().most_programs = Options().most_programs;
  options().sizes_before_dynamic = Options().sizes_before_dynamic;
  options().most_size_programs = Options().most_size_programs;
  torch::manual_seed(0);
}

torch::Device eager_device() { return backing_device(); }

torch::Tensor random(torch::Device device, torch::IntArrayRef sizes, torch::Dtype dtype) {
  const auto host = c10::isIntegralType(dtype, /*includeBool=*/true)
                        ? torch::randint(0, 8, sizes).to(dtype)
                        : torch::randn(sizes, torch::TensorOptions().dtype(dtype));
  return host.to(device);
}

Tensors state_of(const torch::nn::Module& module) {
  return joined(module.parameters(), module.buffers());
}

Tensors gradients_of(const torch::nn::Module& module) {
  Tensors out;
  for (const auto& parameter : module.parameters()) out.push_back(parameter.grad());
  return out;
}

Tensors joined(Tensors first, const Tensors& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

void expect_eager_three_ways(const Program& program, const Ways& ways) {
  begin_test(/*compile=*/false);
  Comparison(program, ways).run();
}

void expect_eager_three_ways(const Tensors& inputs,
                             const std::function<Tensors(Tensors&)>& function,
                             const Ways& ways) {
  expect_eager_three_ways(
      [&](torch::Device device) -> Step {
        return [&, device](int) {
          Tensors copies;
          for (const auto& input : inputs) {
            torch::NoGradGuard no_grad;
            copies.push_back(input.to(device, input.scalar_type(), /*non_blocking=*/false,
                                      /*copy=*/true));
          }
          return joined(function(copies), copies);
        };
      },
      ways);
}

}  // namespace reprise::test
