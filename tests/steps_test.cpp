// Programs that mark no step: their steps are found, their programs are few and
// stable, and most of their ops are verified.
#include "cpp_models/dcgan.h"
#include "cpp_models/lstm_lm.h"
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;
using Steps = Lazy;

struct Expected {
  uint64_t programs;       ///< at most
  double verified = 0.85;  ///< at least this share of all ops
  uint64_t reads = 0;
};

/// Runs the same program on eager and on lazy, in which nothing is marked; its
/// parameters, and what it returns, must be the same to the last bit. Segments
/// are counted without compiling them.
void expect_few_segments(const Program& program, int iterations, const Expected& expected) {
  begin_test(/*compile=*/false);
  torch::manual_seed(2);
  const Step eager = program(eager_device());
  Tensors eager_out;
  for (int k = 0; k < iterations; ++k) eager_out = eager(k);

  torch::manual_seed(2);
  const Step lazy = program(torch::kLazy);
  const Statistics before = statistics();
  Statistics half;
  Tensors lazy_out;
  for (int k = 0; k < iterations; ++k) {
    lazy_out = lazy(k);
    if (k == iterations / 2) half = statistics();
  }
  const Statistics did = since(before), late = since(half);
  for (size_t o = 0; o < eager_out.size(); ++o) {
    SCOPED_TRACE(o);
    expect_same_bits(lazy_out[o].detach(), eager_out[o].detach());
  }
  const auto ops = static_cast<double>(did.ops_recorded + did.ops_verified);
  EXPECT_GE(static_cast<double>(did.ops_verified) / ops, expected.verified) << explain();
  // Segments that ran again and again are what would be compiled.
  EXPECT_LE(did.segments_recorded, 2 * expected.programs + 2) << explain();
  EXPECT_LE(late.segments_recorded, 1u) << explain();
}

template <class Optimizer = torch::optim::Adam>
Program classifier(int read_every) {
  return [=](torch::Device device) -> Step {
    torch::nn::Sequential model(torch::nn::Linear(8, 16), torch::nn::ReLU(),
                                torch::nn::Linear(16, 3));
    model->to(device);
    auto optimizer = std::make_shared<Optimizer>(model->parameters(), 1e-2);
    const auto x = random(device, {6, 8});
    const auto y = torch::tensor({0, 1, 2, 0, 1, 2}).to(device);
    auto read = std::make_shared<double>(0);
    return [=](int k) mutable -> Tensors {
      optimizer->zero_grad();
      const auto loss = F::cross_entropy(model->forward(x), y);
      loss.backward();
      optimizer->step();
      if (read_every > 0 && k % read_every == read_every - 1) *read += loss.item<double>();
      return joined({loss, torch::full({}, *read)}, model->parameters());
    };
  };
}

TEST_F(Steps, ATrainingLoopThatNeverReads) {
  expect_few_segments(classifier(0), 60, {.programs = 2});
}

TEST_F(Steps, ATrainingLoopThatReadsItsLossNowAndThen) {
  expect_few_segments(classifier(20), 120, {.programs = 3});
}

TEST_F(Steps, ATrainingLoopThatReadsEachLoss) {
  expect_few_segments(classifier(1), 60, {.programs = 2});
}

TEST_F(Steps, BatchesFromTheHost) {
  expect_few_segments(
      [](torch::Device device) -> Step {
        torch::nn::Linear model(8, 3);
        model->to(device);
        auto optimizer = std::make_shared<torch::optim::SGD>(model->parameters(), 0.1);
        return [=](int) mutable -> Tensors {
          const auto x = random(device, {6, 8});
          const auto y = torch::tensor({0, 1, 2, 0, 1, 2}).to(device);
          const auto loss = F::cross_entropy(model->forward(x), y);
          optimizer->zero_grad();
          loss.backward();
          optimizer->step();
          return joined({loss}, model->parameters());
        };
      },
      60, {.programs = 2});
}

TEST_F(Steps, AGanWithTwoOptimizers) {
  expect_few_segments(
      [](torch::Device device) -> Step {
        const cpp_models::DcganOptions options{
            .image_size = 8, .channels = 1, .latent = 8, .width = 4};
        cpp_models::DcganGenerator generator(options);
        cpp_models::DcganDiscriminator critic(options);
        generator->to(device);
        critic->to(device);
        auto generator_optimizer =
            std::make_shared<torch::optim::Adam>(generator->parameters(), 1e-3);
        auto critic_optimizer = std::make_shared<torch::optim::Adam>(critic->parameters(), 1e-3);
        const auto loss_of = [](const torch::Tensor& logits, double wanted) {
          return F::binary_cross_entropy_with_logits(logits, torch::full_like(logits, wanted));
        };
        return [=](int) mutable -> Tensors {
          const auto real = random(device, {4, 1, 8, 8});
          const auto fake = generator->forward(random(device, {4, 8}));
          critic_optimizer->zero_grad();
          const auto critic_loss =
              loss_of(critic->forward(real), 1) + loss_of(critic->forward(fake.detach()), 0);
          critic_loss.backward();
          critic_optimizer->step();
          generator_optimizer->zero_grad();
          const auto generator_loss = loss_of(critic->forward(fake), 1);
          generator_loss.backward();
          generator_optimizer->step();
          return joined({critic_loss, generator_loss}, generator->parameters());
        };
      },
      40, {.programs = 3, .verified = 0.8});
}

TEST_F(Steps, AnUnrolledLstm) {
  expect_few_segments(
      [](torch::Device device) -> Step {
        cpp_models::LstmLm model(
            cpp_models::LstmLmOptions{.vocabulary = 11, .embedding = 8, .hidden = 8});
        model->to(device);
        auto optimizer = std::make_shared<torch::optim::SGD>(model->parameters(), 0.1);
        return [=](int) mutable -> Tensors {
          const auto text = torch::randint(11, {2, 13}, torch::kLong).to(device);
          optimizer->zero_grad();
          const auto loss = F::cross_entropy(model->forward(text.slice(1, 0, 12)).flatten(0, 1),
                                             text.slice(1, 1, 13).flatten());
          loss.backward();
          optimizer->step();
          return joined({loss}, model->parameters());
        };
      },
      40, {.programs = 3, .verified = 0.8});
}

TEST_F(Steps, AnInferenceLoop) {
  expect_few_segments(
      [](torch::Device device) -> Step {
        torch::nn::Sequential model;
        for (int layer = 0; layer < 14; ++layer) {
          model->push_back(torch::nn::Linear(8, 8));
          model->push_back(torch::nn::ReLU());
        }
        model->to(device);
        model->eval();
        auto kept = std::make_shared<Tensors>();
        return [=](int) mutable -> Tensors {
          torch::NoGradGuard no_grad;
          kept->push_back(model->forward(random(device, {2, 8})));
          return *kept;
        };
      },
      60, {.programs = 3, .verified = 0.8});
}

TEST_F(Steps, ATrainingLoopIsCompiledAndReplayed) {
  begin_test(/*compile=*/true);
  options().compile_after_ops = 64;
  torch::manual_seed(2);
  const Step eager = classifier(25)(eager_device());
  torch::manual_seed(2);
  const Step lazy = classifier(25)(torch::kLazy);
  const Statistics before = statistics();
  Statistics settled;
  Tensors eager_out, lazy_out;
  for (int k = 0; k < 200; ++k) {
    eager_out = eager(k);
    lazy_out = lazy(k);
    if (k == 60 || k == 80) wait_for_compiles();
    if (k == 100) settled = statistics();
  }
  mark_step();
  const Statistics did = since(before), late = since(settled);
  EXPECT_LE(did.programs_requested, 4u) << explain();
  EXPECT_GE(late.segments_replayed, 90u) << explain();
  EXPECT_LE(late.segments_interpreted, 10u) << explain();
  expect_close(lazy_out[0].detach(), eager_out[0].detach(), 1000);
}

TEST_F(Steps, WithoutTheFinderOnlyReadsEndThem) {
  options().find_steps = false;
  const Step step = classifier<torch::optim::SGD>(5)(torch::kLazy);
  const Statistics before = statistics();
  for (int k = 0; k < 40; ++k) step(k);
  const Statistics did = since(before);
  EXPECT_GT(did.segments_interpreted, 4u) << explain();
  EXPECT_LE(did.segments_interpreted, 8u) << explain();
}

TEST_F(Steps, AProgramThatNeverRepeatsIsRight) {
  begin_test(false);
  const auto run = [](torch::Device device) {
    auto x = torch::ones({3}, device);
    for (int k = 1; k < 3000; ++k) x = (x * (k % 7)).narrow(0, k % 2, 2).repeat({2}).remainder(5 + k);
    return x;
  };
  expect_same_bits(run(torch::kLazy), run(eager_device()));
}

}  // namespace
}  // namespace reprise::test
