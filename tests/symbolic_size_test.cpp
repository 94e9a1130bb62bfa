// Sizes that the user marks: programs over symbols from the first trace.
#include <torch/torch.h>

#include "cpp_models/gpt.h"
#include "tests/expect_error.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

using SymbolicSizes = LazySizes;
using SymInts = std::vector<c10::SymInt>;

torch::Tensor batch(torch::Device device, torch::IntArrayRef sizes) {
  return torch::rand(sizes).to(device);
}

std::string text_of(const c10::SymInt& number) {
  return number.is_symbolic() ? number.toSymNode()->str()
                              : "plain " + std::to_string(number.expect_int());
}
std::string text_of(c10::SymIntArrayRef numbers) {
  std::string out;
  for (const c10::SymInt& number : numbers) out += (out.empty() ? "" : " ") + text_of(number);
  return out;
}

TEST_F(SymbolicSizes, AreKnownOfTheMarkedTensor) {
  auto x = batch(torch::kLazy, {6, 5});
  mark_dynamic(x, 0, {.name = "rows"});
  EXPECT_TRUE(x.sym_size(0).is_symbolic());
  EXPECT_EQ(text_of(x.sym_sizes()), "rows plain 5");
  EXPECT_EQ(text_of(x.sym_numel()), "rows * 5");
  EXPECT_EQ(text_of(x.sym_strides()), "plain 5 plain 1");
  EXPECT_EQ(x.size(0), 6);
  EXPECT_EQ(x.sizes(), torch::IntArrayRef({6, 5}));
  EXPECT_EQ(x.numel(), 30);
  mark_dynamic(x, -1, {.name = "columns"});
  EXPECT_EQ(text_of(x.sym_sizes()), "rows columns");
  EXPECT_EQ(text_of(x.sym_strides()), "columns plain 1");
  EXPECT_TRUE(x.is_contiguous());
  expect_same_bits(x, x.cpu());
}

TEST_F(SymbolicSizes, AreKnownOfWhatIsMadeOfIt) {
  auto x = batch(torch::kLazy, {6, 8, 5});
  mark_dynamic(x, 0, {.name = "batch"});
  mark_dynamic(x, 1, {.name = "tokens"});
  const auto weight = batch(torch::kLazy, {5, 7});
  EXPECT_EQ(text_of((x + 1).sym_sizes()), "batch tokens plain 5");
  EXPECT_EQ(text_of(x.matmul(weight).sym_sizes()), "batch tokens plain 7");
  EXPECT_EQ(text_of(x.sum(1).sym_sizes()), "batch plain 5");
  EXPECT_EQ(text_of(x.transpose(1, 2).sym_sizes()), "batch plain 5 tokens");
  EXPECT_EQ(text_of(torch::cat({x, x}, 1).sym_sizes()), "batch 2 * tokens plain 5");
  EXPECT_EQ(text_of(x.slice_symint(1, 0, x.sym_size(1) - 1).sym_sizes()), "batch tokens - 1 plain 5");
  const auto flat = x.view_symint(SymInts{x.sym_size(0) * x.sym_size(1), 5});
  EXPECT_EQ(text_of(flat.sym_sizes()), "batch * tokens plain 5");
  EXPECT_EQ(text_of(weight.sym_sizes()), "plain 5 plain 7");
  EXPECT_EQ(text_of(x.unbind(2)[1].sym_sizes()), "batch tokens");
  EXPECT_EQ(text_of(x.detach().sym_sizes()), "batch tokens plain 5");
  auto turned = x.detach();
  turned.unsqueeze_(0);  // how it lies is changed in place: nothing is known of it
  EXPECT_EQ(turned.sizes(), torch::IntArrayRef({1, 6, 8, 5}));
  EXPECT_EQ(text_of(turned.sym_sizes()), "plain 1 plain 6 plain 8 plain 5");
}

TEST_F(SymbolicSizes, AreKnownOfWhatWasVerified) {
  for (int step = 0; step < 3; ++step) {
    auto x = batch(torch::kLazy, {6, 5});
    mark_dynamic(x, 0, {.name = "rows"});
    const Statistics before = statistics();
    const auto y = (x * 2).relu().t();
    EXPECT_EQ(text_of(y.sym_sizes()), "plain 5 rows") << "step " << step;
    EXPECT_EQ(since(before).ops_recorded, step == 0 ? 3u : 0u);
    mark_step();
  }
}

TEST_F(SymbolicSizes, Calculate) {
  auto x = batch(torch::kLazy, {12});
  mark_dynamic(x, 0, {.name = "n"});
  const c10::SymInt n = x.sym_size(0);
  EXPECT_EQ(text_of(n + 3), "n + 3");
  EXPECT_EQ(text_of(3 - n), "3 - n");
  EXPECT_EQ(text_of(n * n), "n * n");
  EXPECT_EQ(text_of((n + 1) / 4), "(n + 1) // 4");
  EXPECT_EQ(text_of(n % 5), "n % 5");
  EXPECT_EQ(text_of(n.min(7)), "min(n, 7)");
  EXPECT_EQ(text_of(n.max(7)), "max(n, 7)");
  EXPECT_EQ(text_of(n - n), "0");
  EXPECT_EQ(((n + 1) / 4).guard_int(__FILE__, __LINE__), 3);
  EXPECT_EQ((n % 5).guard_int(__FILE__, __LINE__), 2);
  EXPECT_EQ((n / 5).guard_int(__FILE__, __LINE__), 2);
  EXPECT_TRUE(n.has_hint());
  EXPECT_TRUE(n == 12);
  EXPECT_TRUE(n > 3 && n <= 12 && n != 5);
  EXPECT_EQ((n * 1.5).guard_float(__FILE__, __LINE__), 18.0);
  expect_error<c10::ValueError>([&] { (void)(n / (n - 12)); }, "n // (n - 12) divides by zero");
  expect_error<c10::ValueError>([&] { (void)(n * (int64_t{1} << 60)); }, "does not fit into 64 bits");
}

/// Eager, and lazy with marks, at these sizes in turn: one program for all of them, asked for
/// after the first.
void expect_one_program(const std::function<std::function<Tensors(torch::IntArrayRef)>(torch::Device)>& make,
                        const std::vector<std::vector<int64_t>>& sizes, double tolerance = 10) {
  torch::manual_seed(0);
  const auto eager = make(eager_device());
  torch::manual_seed(0);
  const auto lazy = make(torch::kLazy);
  const Statistics before = statistics();
  uint64_t replayed = 0;
  int step = 0;
  for (int round = 0; round < 3; ++round) {
    for (const auto& size : sizes) {
      for (int again = 0; again < (step == 0 ? 3 : 1); ++again) {
        SCOPED_TRACE(c10::str("step ", step, ", sizes ", torch::IntArrayRef(size)));
        torch::manual_seed(++step);
        const Tensors expected = eager(size);
        torch::manual_seed(step);
        Tensors actual = lazy(size);
        mark_step();
        expect_all_close(actual, expected, tolerance);
        wait_for_compiles();
      }
    }
  }
  const Statistics what = since(before);
  replayed = what.segments_replayed;
  EXPECT_EQ(what.programs_compiled + what.programs_loaded, 1u) << explain();
  EXPECT_EQ(what.compile_failures, 0u) << explain();
  EXPECT_GE(replayed, 1u) << explain();
}

TEST_F(SymbolicSizes, OneTraceMakesAProgramForAllSizes) {
  expect_one_program(
      [](torch::Device device) {
        const auto w = random(device, {8, 12}), v = random(device, {12, 3});
        return [=](torch::IntArrayRef size) -> Tensors {
          auto x = batch(device, {size[0], size[1], 8});
          if (device.is_lazy()) {
            mark_dynamic(x, 0, {.name = "batch"});
            mark_dynamic(x, 1, {.name = "tokens", .least = 2});
          }
          auto h = x.matmul(w);
          h = h.view_symint(SymInts{x.sym_size(0), x.sym_size(1), 4, 3}).transpose(1, 2);
          const auto scores = torch::softmax(h.matmul(h.transpose(2, 3)), -1);
          h = scores.matmul(h).transpose(1, 2).reshape_symint(SymInts{x.sym_size(0), x.sym_size(1), 12});
          for (int k = 0; k < 6; ++k) h = (h * 0.5 + 1).tanh();
          return {h.matmul(v), h.mean(1)};
        };
      },
      {{4, 6}, {3, 9}, {7, 5}, {2, 16}});
  EXPECT_NE(explain().find("batch = 4 (input 0 dim 0), tokens = 6 (input 0 dim 1)"), std::string::npos)
      << explain();
  EXPECT_NE(explain().find("symbolic: batch, tokens (2 to any)"), std::string::npos) << explain();
}

TEST_F(SymbolicSizes, TrainingStepsToo) {
  expect_one_program(
      [](torch::Device device) {
        auto net = torch::nn::Sequential(torch::nn::Linear(8, 16), torch::nn::GELU(),
                                         torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})),
                                         torch::nn::Linear(16, 4));
        net->to(device);
        auto adam = std::make_shared<torch::optim::Adam>(net->parameters(), 1e-2);
        return [=](torch::IntArrayRef size) mutable -> Tensors {
          auto x = batch(device, {size[0], 8});
          auto y = torch::randint(4, {size[0]}, torch::kLong).to(device);
          if (device.is_lazy()) {
            mark_dynamic(x, 0, {.name = "batch"});
            mark_dynamic(y, 0, {.name = "batch"});
          }
          adam->zero_grad();
          const auto loss = torch::nn::functional::cross_entropy(net->forward(x), y);
          loss.backward();
          adam->step();
          return {loss.detach()};
        };
      },
      {{6}, {9}, {4}, {16}}, 100);
}

TEST_F(SymbolicSizes, GuardsAreListed) {
  auto x = batch(torch::kLazy, {6, 5});
  mark_dynamic(x, 0, {.name = "rows"});
  auto y = x * 2;
  if (x.sym_size(0) > 4) y = y + 1;
  y = y.relu();
  mark_step();
  EXPECT_NE(explain().find("guard: rows > 4, asked before op 1"), std::string::npos) << explain();
}

// The other way is another trace, whatever was said of the size.
TEST_F(SymbolicSizes, AGuardThatFailsIsAnotherTrace) {
  const auto run = [](torch::Device device, int64_t rows) {
    auto x = torch::arange(rows * 3, torch::kFloat).view({rows, 3}).to(device);
    if (device.is_lazy()) mark_dynamic(x, 0, {.name = "rows"});
    auto y = x * 2;
    for (int k = 0; k < 10; ++k) y = x.sym_size(0) > 4 ? y.sin() : y.cos();
    if (device.is_lazy()) mark_step();
    return y;
  };
  for (int round = 0; round < 6; ++round) {
    for (const int64_t rows : {6, 3, 7, 2, 5}) {
      SCOPED_TRACE(rows);
      expect_close(run(torch::kLazy, rows), run(eager_device(), rows), 10);
      wait_for_compiles();
    }
  }
}

// Plain numbers, as `size()` gives them and libtorch's own composites use them, are taken
// for what they can be.
TEST_F(SymbolicSizes, PlainNumbersAreGuessed) {
  expect_one_program(
      [](torch::Device device) {
        const auto w = random(device, {8, 12});
        return [=](torch::IntArrayRef size) -> Tensors {
          auto x = batch(device, {size[0], size[1], 8});
          if (device.is_lazy()) {
            mark_dynamic(x, 0, {.name = "batch"});
            mark_dynamic(x, 1, {.name = "tokens"});
          }
          auto y = x.matmul(w).view({x.size(0), x.size(1), 3, 4}).transpose(1, 2).relu();
          y = y.reshape({x.size(0) * 3, x.size(1) * 4}).expand({2, 3 * x.size(0), -1});
          for (int k = 0; k < 12; ++k) y = (y + 0.5).tanh();
          return {y};
        };
      },
      {{3, 5}, {4, 6}, {5, 5}, {2, 9}});
}

// Where nothing explains it, a size is fixed; the program is right all the same.
TEST_F(SymbolicSizes, AFixedSizeIsSaidInExplain) {
  const auto w = random(torch::kLazy, {6, 8});
  auto plain = random(torch::kLazy, {3});  // a step without symbols before
  for (int k = 0; k < 5; ++k) plain = plain.sin();
  mark_step();  // ops are counted from a step's beginning
  for (int round = 0; round < 4; ++round) {
    auto x = batch(torch::kLazy, {6, 8});
    mark_dynamic(x, 0, {.name = "rows"});
    const auto y = (x.relu() * w).sum(0);
    EXPECT_EQ(text_of(y.sym_sizes()), "plain 8");
    mark_step();
    expect_close(y, (x.cpu().relu() * w.cpu()).sum(0), 10);
  }
  EXPECT_NE(explain().find("rows is fixed by aten::mul.Tensor, op 1: The size of tensor a"),
            std::string::npos)
      << explain();
}

TEST_F(SymbolicSizes, StaticSizesHaveProgramsOfTheirOwn) {
  const auto w = random(torch::kLazy, {8});
  const Statistics before = statistics();
  for (int round = 0; round < 5; ++round) {
    for (const int64_t rows : {6, 9, 4}) {
      auto x = batch(torch::kLazy, {rows, 8});
      mark_static(x, 0);
      auto y = x * w;
      for (int k = 0; k < 20; ++k) y = (y + 1).tanh();
      mark_step();
      wait_for_compiles();
    }
  }
  const Statistics what = since(before);
  EXPECT_EQ(what.programs_compiled + what.programs_loaded, 3u) << explain();
  EXPECT_EQ(what.programs_shared, 0u) << explain();
}

// Two sizes under one name: the trace is what it is, and the name is of no use.
TEST_F(SymbolicSizes, OneNameForTwoSizesIsSaidInExplain) {
  auto x = batch(torch::kLazy, {6, 5}), y = batch(torch::kLazy, {7, 5});
  mark_dynamic(x, 0, {.name = "rows"});
  mark_dynamic(y, 0, {.name = "rows"});
  const auto z = torch::cat({x * 2, y}, 0);
  mark_step();
  EXPECT_EQ(z.sizes(), torch::IntArrayRef({13, 5}));
  expect_same_bits(z, torch::cat({x.cpu() * 2, y.cpu()}, 0));
  EXPECT_NE(explain().find("a size is another here than in an earlier op"), std::string::npos)
      << explain();
}

TEST_F(SymbolicSizes, AListAsLongAsASizeFixesIt) {
  auto x = torch::ones({40, 8}).to(torch::kLazy);
  mark_dynamic(x, 0, {.name = "rows", .least = 1, .most = 64});
  const auto rows = x.unbind(0);
  auto sum = rows[0];
  for (size_t k = 1; k < rows.size(); ++k) sum = sum + rows[k];
  mark_step();
  expect_close(sum, torch::full({8}, 40.0F), 1);
  EXPECT_NE(explain().find("rows is fixed by aten::unbind"), std::string::npos) << explain();
}

TEST_F(SymbolicSizes, MayBeCalculatedWithForEver) {
  auto x = torch::ones({40, 8}).to(torch::kLazy);
  mark_dynamic(x, 0, {.name = "rows"});
  c10::SymInt n = x.sym_size(0), halved = x.sym_size(0);
  for (int k = 0; k < 100'000; ++k) n = n + 1;
  EXPECT_EQ(n.guard_int(__FILE__, __LINE__), 100'040);
  EXPECT_EQ(c10::str(n), "rows + 100000");
  for (int k = 0; k < 60; ++k) halved = (halved + halved % 2) / 2;
  EXPECT_EQ(x.narrow_symint(0, 0, halved).size(0), 1);
  for (int k = 0; k < 100'000; ++k) n = n - 1;
  EXPECT_EQ(n.guard_int(__FILE__, __LINE__), 40);
}

TEST_F(SymbolicSizes, BadMarksAreErrors) {
  auto x = batch(torch::kLazy, {6, 5});
  expect_error<c10::ValueError>([&] { mark_dynamic(x, 0, {.name = "rows", .most = 4}); },
                                "('rows') of a tensor of sizes [6, 5]: expected 0 to 4, it is 6");
  expect_error<c10::ValueError>([&] { mark_dynamic(x, 0, {.name = "rows", .least = 8, .most = 4}); },
                                "no size is at least 8 and at most 4");
  expect_error<c10::IndexError>([&] { mark_dynamic(x, 2); }, "Dimension out of range");
  expect_error<c10::IndexError>([&] { mark_static(x, -3); }, "Dimension out of range");
  mark_dynamic(x, 0, {.name = "bounded rows", .most = 64});
  expect_error<c10::ValueError>([&] { mark_dynamic(x, 0, {.name = "bounded rows", .most = 32}); },
                                "'bounded rows' is 0 to 32 here and was 0 to 64 before");
  expect_error<c10::ValueError>([&] { mark_static(x, 0); }, "has marked as 'bounded rows'");
  mark_static(x, 1);
  expect_error<c10::ValueError>([&] { mark_dynamic(x, 1, {.name = "columns"}); },
                                "which mark_static has marked");
  auto host = torch::ones({2});
  expect_error<c10::Error>([&] { mark_dynamic(host, 0); }, "mark the tensor that .to(torch::kLazy) returns");
  auto weight = batch(torch::kLazy, {3}).requires_grad_();
  expect_error<c10::Error>([&] { mark_dynamic(weight, 0); }, "mark it before requires_grad_()");
  torch::Tensor none;
  expect_error<c10::Error>([&] { mark_static(none, 0); }, "undefined");
  EXPECT_EQ((x + 1).sizes(), torch::IntArrayRef({6, 5}));
}

// A size that an op cannot have is eager's error, at the call.
TEST_F(SymbolicSizes, ErrorsAreEagers) {
  auto x = batch(torch::kLazy, {6, 5});
  mark_dynamic(x, 0, {.name = "rows"});
  expect_error<c10::Error>([&] { (void)x.view_symint(SymInts{x.sym_size(0) + 1, 5}); },
                           "shape '[7, 5]' is invalid for input of size 30");
  EXPECT_EQ(text_of((x * 2).sym_sizes()), "rows plain 5");
}

}  // namespace
}  // namespace reprise::test
