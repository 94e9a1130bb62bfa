/// Programs whose sizes and scalars change from step to step, on the lazy device against
/// eager on its backing device.
///
///   gpt_inference_64_shapes    64 pairs of batch and length
///   gpt_training_64_shapes     the same, forward, backward and SGD
///   gpt_inference_ever_new, gpt_training_ever_new   no pair comes twice in 915 steps
///   gpt_inference_usual/over_symbols, gpt_inference_usual/own, gpt_training_usual/...
///                              one size after others that made the program one over symbols;
///                              with that program, and where it may get one of its own
///   resnet_inference_sizes     12 sizes of images
///   lstm_training_lengths      sequences of 5 to 60 tokens, unrolled
///   adam_training, lr_schedule one size; bias corrections, a rate that changes each step
///   decode_200/concatenated, decode_200/preallocated
///                              200 tokens, one by one, with a cache of keys and values
///
/// Counters: `compiles_after_token_8` (of decoding: in the first text), `compiles` and `programs`
/// (programs compiled or loaded from the artifact store), `shared` (how many other sizes, and
/// iterations of loops, took one of them over), `speedup` (median over the turns of eager's time
/// by ours, each turn a pass over all sizes), `max_rel_diff` (of what the steps return, in the
/// last pass), `replayed` (share of the segments in the timed passes), `re_records`
/// (segments recorded in the timed passes).
#include <ATen/CPUGeneratorImpl.h>
#include <benchmark/benchmark.h>
#include <reprise/reprise.h>
#include <reprise/testing.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpp_models/gpt.h"
#include "cpp_models/lstm_lm.h"
#include "cpp_models/mlp.h"
#include "cpp_models/resnet.h"
#include "harness.h"
#include "paired_timing.h"

namespace {

namespace F = torch::nn::functional;
using Tensors = std::vector<torch::Tensor>;

/// One pass over all sizes; returns what to compare.
using Pass = std::function<Tensors()>;

struct Row {
  std::string name;
  std::function<Pass(torch::Device)> make;
  bool specializes = true;
  /// Recorded, verified and asked for, checked, perhaps with disturbed runs, timed in turns.
  int settling_passes = 9;
};

template <class Model>
Pass training(Model model, std::shared_ptr<torch::optim::Optimizer> optimizer,
              std::vector<Tensors> batches, std::function<void(int)> before_step = {}) {
  auto step = std::make_shared<int>(0);
  return [=]() mutable -> Tensors {
    Tensors losses;
    for (const Tensors& batch : batches) {
      if (before_step) before_step((*step)++);
      optimizer->zero_grad();
      const auto loss = F::cross_entropy(model->forward(batch[0]).flatten(0, -2), batch[1]);
      loss.backward();
      optimizer->step();
      losses.push_back(loss.detach());
      if (batch[0].is_lazy()) reprise::mark_step();
    }
    return losses;
  };
}

template <class Model>
Pass inference(Model model, Tensors inputs) {
  model->eval();
  return [=]() mutable -> Tensors {
    torch::NoGradGuard no_grad;
    Tensors out;
    for (const auto& input : inputs) {
      out.push_back(model->forward(input));
      if (input.is_lazy()) reprise::mark_step();
    }
    return out;
  };
}

std::vector<std::pair<int64_t, int64_t>> shapes() {
  std::vector<std::pair<int64_t, int64_t>> out;
  for (int64_t batch = 2; batch <= 9; ++batch) {
    for (int64_t k = 0; k < 8; ++k) out.emplace_back(batch, 12 + 6 * k + batch % 3);
  }
  return out;
}

cpp_models::Gpt small_gpt() {
  return cpp_models::Gpt(cpp_models::GptOptions{.width = 64, .heads = 4, .layers = 2,
                                                .attention = cpp_models::Attention::kMatmul});
}

torch::Tensor tokens(torch::IntArrayRef size) { return torch::randint(96, size, torch::kLong); }

Pass gpt_inference(torch::Device device) {
  auto model = small_gpt();
  model->to(device);
  Tensors inputs;
  for (const auto& [batch, length] : shapes()) inputs.push_back(tokens({batch, length}).to(device));
  return inference(model, inputs);
}

Pass gpt_training(torch::Device device) {
  auto model = small_gpt();
  model->to(device);
  std::vector<Tensors> batches;
  for (const auto& [batch, length] : shapes()) {
    batches.push_back({tokens({batch, length}).to(device), tokens({batch * length}).to(device)});
  }
  return training(model,
                  std::make_shared<torch::optim::SGD>(model->parameters(),
                                                      torch::optim::SGDOptions(1e-6).momentum(0.9)),
                  batches);
}

/// Three sizes in the first passes, then one of them, several times a pass.
Pass usual_size(const std::function<Pass(Tensors)>& make, torch::Device device) {
  constexpr int kPassesOfAll = 5, kUsual = 8;
  Tensors all, usual;
  for (const auto& [batch, length] : {std::pair{4, 24}, {6, 32}, {8, 48}}) {
    all.push_back(tokens({batch, length}).to(device));
  }
  for (int k = 0; k < kUsual; ++k) usual.push_back(all.back());
  return [first = make(all), then = make(usual), passes = 0]() mutable {
    return passes++ < kPassesOfAll ? first() : then();
  };
}

Pass gpt_usual(torch::Device device, bool trains) {
  auto model = small_gpt();
  model->to(device);
  auto optimizer = std::make_shared<torch::optim::SGD>(
      model->parameters(), torch::optim::SGDOptions(1e-6).momentum(0.9));
  return usual_size(
      [=](const Tensors& texts) {
        if (!trains) return inference(model, texts);
        std::vector<Tensors> batches;
        for (const auto& text : texts) batches.push_back({text, text.flatten()});
        return training(model, optimizer, batches);
      },
      device);
}

/// Sixteen steps a pass, none of a size that was there before.
Pass gpt_ever_new(torch::Device device, bool trains) {
  auto model = small_gpt();
  model->to(device);
  auto optimizer = std::make_shared<torch::optim::SGD>(
      model->parameters(), torch::optim::SGDOptions(1e-6).momentum(0.9));
  auto step = std::make_shared<int64_t>(0);
  return [=]() mutable -> Tensors {
    constexpr int64_t kSteps = 16, kBatches = 15, kLengths = 61;
    torch::AutoGradMode grad(trains);
    Tensors out;
    for (int64_t k = 0; k < kSteps; ++k, ++*step) {
      // Each pair once in 15 * 61 steps.
      const int64_t batch = 2 + *step % kBatches, length = 4 + *step * 7 % kLengths;
      const auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(*step));
      const auto text = torch::randint(96, {batch, length}, generator, torch::kLong).to(device);
      if (trains) {
        optimizer->zero_grad();
        const auto loss = F::cross_entropy(model->forward(text).flatten(0, -2), text.flatten());
        loss.backward();
        optimizer->step();
        out.push_back(loss.detach());
      } else {
        out.push_back(model->forward(text));
      }
      if (text.is_lazy()) reprise::mark_step();
    }
    return out;
  };
}

Pass resnet_inference(torch::Device device) {
  cpp_models::ResNet model(cpp_models::ResNetOptions{.depth = 8});
  model->to(device);
  Tensors images;
  for (int64_t size = 20; size < 68; size += 4) {
    images.push_back(torch::rand({4, 3, size, size}).to(device));
  }
  return inference(model, images);
}

Pass lstm_training(torch::Device device) {
  cpp_models::LstmLm model(cpp_models::LstmLmOptions{.embedding = 32, .hidden = 32});
  model->to(device);
  std::vector<Tensors> batches;
  for (int64_t length = 5; length <= 60; length += 5) {
    batches.push_back({tokens({8, length}).to(device), tokens({8 * length}).to(device)});
  }
  return training(model,
                  std::make_shared<torch::optim::SGD>(model->parameters(),
                                                      torch::optim::SGDOptions(1e-6)),
                  batches);
}

Pass adam_training(torch::Device device, bool schedule) {
  cpp_models::Mlp model(cpp_models::MlpOptions{.inputs = 64, .hidden = {128, 128}, .outputs = 10});
  model->to(device);
  std::vector<Tensors> batches;
  for (int k = 0; k < 8; ++k) {
    batches.push_back({torch::rand({32, 64}).to(device),
                       torch::randint(10, {32}, torch::kLong).to(device)});
  }
  auto adam = std::make_shared<torch::optim::Adam>(model->parameters(),
                                                   torch::optim::AdamOptions(1e-9));
  std::function<void(int)> before_step;
  if (schedule) {
    before_step = [adam](int step) {
      for (auto& group : adam->param_groups()) group.options().set_lr(1e-9 / (1 + step));
    };
  }
  return training(model, adam, batches, before_step);
}

/// What the ninth and later tokens of the first text cost in compiles.
struct LateCompiles {
  static uint64_t so_far() {
    const auto s = reprise::statistics();
    return s.programs_compiled + s.programs_loaded;
  }
  uint64_t at_eighth = 0, after = 0;
};
LateCompiles late_compiles;

/// A layer of attention that is given one token after the other.
Pass decode(torch::Device device, bool preallocated) {
  constexpr int64_t kTokens = 200, kWidth = 64, kBatch = 4;
  const auto project = torch::rand({kWidth, 3 * kWidth}).sub_(0.5).to(device);
  const auto start = torch::rand({kBatch, 1, kWidth}).to(device);
  return [=, first = device.is_lazy()]() mutable -> Tensors {
    torch::NoGradGuard no_grad;
    auto x = start;
    auto keys = torch::zeros({kBatch, preallocated ? kTokens : 0, kWidth}, x.options());
    auto values = keys.clone();
    for (int64_t position = 0; position < kTokens; ++position) {
      const auto parts = x.matmul(project).split(kWidth, -1);
      torch::Tensor k, v;
      if (preallocated) {
        keys.slice(1, position, position + 1).copy_(parts[1]);
        values.slice(1, position, position + 1).copy_(parts[2]);
        k = keys.slice(1, 0, position + 1);
        v = values.slice(1, 0, position + 1);
      } else {
        k = keys = torch::cat({keys, parts[1]}, 1);
        v = values = torch::cat({values, parts[2]}, 1);
      }
      x = torch::tanh(torch::softmax(parts[0].matmul(k.transpose(1, 2)) / 8.0, -1).matmul(v) + x);
      if (x.is_lazy()) reprise::mark_step();
      if (first && position == 7) {
        reprise::wait_for_compiles();
        late_compiles.at_eighth = LateCompiles::so_far();
      }
    }
    if (std::exchange(first, false)) {
      reprise::wait_for_compiles();
      late_compiles.after = LateCompiles::so_far() - late_compiles.at_eighth;
    }
    return {x};
  };
}

void measure(benchmark::State& state, const Row& row) {
  reprise::options().specialize_sizes = row.specializes;
  torch::manual_seed(5);
  const Pass eager = row.make(reprise::backing_device());
  torch::manual_seed(5);
  const Pass lazy = row.make(torch::kLazy);
  reprise::sync();
  const auto begin = reprise::statistics();
  Tensors expected, actual;
  for (int pass = 0; pass < row.settling_passes; ++pass) {
    expected = eager();
    actual = lazy();
    reprise::wait_for_compiles();
  }
  const double difference = bench::max_relative_difference(expected, actual);
  reprise::mark_step();  // what it did to the results is no part of the next step

  const auto before = reprise::statistics();
  const auto timing = bench::time_in_pairs(
      [&](int64_t times) { return bench::seconds_of(times, [&] { eager(); }); },
      [&](int64_t times) {
        return bench::seconds_of(times, [&] {
          lazy();
          reprise::sync();
        });
      });
  const auto after = reprise::statistics();
  for (auto _ : state) {
    lazy();
    reprise::sync();
  }
  const auto count = [](uint64_t a, uint64_t b) { return static_cast<double>(a - b); };
  const double replayed = count(after.segments_replayed, before.segments_replayed);
  const double all = replayed + count(after.segments_interpreted, before.segments_interpreted) +
                     count(after.segments_recorded, before.segments_recorded);
  const double compiles = count(after.programs_compiled, begin.programs_compiled) +
                          count(after.programs_loaded, begin.programs_loaded);
  state.counters["compiles"] = compiles;
  if (row.name.starts_with("decode")) {
    state.counters["compiles_after_token_8"] = static_cast<double>(late_compiles.after);
  }
  state.counters["programs"] = compiles;
  state.counters["shared"] = count(after.programs_shared, begin.programs_shared);
  state.counters["speedup"] = timing.speedup;
  state.counters["max_rel_diff"] = difference;
  state.counters["replayed"] = all > 0 ? replayed / all : 0.0;
  state.counters["re_records"] = count(after.segments_recorded, before.segments_recorded);
  reprise::testing::forget_traces();
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kUntilOften = 60;  // passes of eight steps: it is often after 256, and decided then
  const std::vector<Row> rows = {
      {"gpt_inference_64_shapes", gpt_inference},
      {"gpt_training_64_shapes", gpt_training},
      {"gpt_inference_ever_new", [](torch::Device device) { return gpt_ever_new(device, false); }},
      {"gpt_training_ever_new", [](torch::Device device) { return gpt_ever_new(device, true); }},
      {"gpt_inference_usual/over_symbols",
       [](torch::Device device) { return gpt_usual(device, false); }, false, kUntilOften},
      {"gpt_inference_usual/own", [](torch::Device device) { return gpt_usual(device, false); },
       true, kUntilOften},
      {"gpt_training_usual/over_symbols",
       [](torch::Device device) { return gpt_usual(device, true); }, false, kUntilOften},
      {"gpt_training_usual/own", [](torch::Device device) { return gpt_usual(device, true); },
       true, kUntilOften},
      {"resnet_inference_sizes", resnet_inference},
      {"lstm_training_lengths", lstm_training},
      {"adam_training", [](torch::Device device) { return adam_training(device, false); }},
      {"lr_schedule", [](torch::Device device) { return adam_training(device, true); }},
      {"decode_200/concatenated", [](torch::Device device) { return decode(device, false); }},
      {"decode_200/preallocated", [](torch::Device device) { return decode(device, true); }},
  };
  benchmark::AddCustomContext("backing_device", reprise::backing_device().str());
  for (const Row& row : rows) {
    benchmark::RegisterBenchmark(row.name.c_str(),
                                 [&row](benchmark::State& state) { measure(state, row); })
        ->Iterations(1)  // what it learned in one measurement would be known in the next
        ->Unit(benchmark::kMillisecond);
  }
  return bench::run_registered(argc, argv);
}
