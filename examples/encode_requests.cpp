/// Serves an encoder: each request is a batch of texts of another length. The program names
/// the two sizes that change, and gets one compiled program for all of them from its first
/// trace on.
#include <reprise/reprise.h>
#include <torch/torch.h>

#include <cstdio>
#include <random>

#include "program.h"

namespace {

struct Block : torch::nn::Module {
  Block(int64_t width, int64_t heads)
      : heads(heads),
        norm1(register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))),
        norm2(register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))),
        project(register_module("project", torch::nn::Linear(width, 3 * width))),
        join(register_module("join", torch::nn::Linear(width, width))),
        widen(register_module("widen", torch::nn::Linear(width, 4 * width))),
        narrow(register_module("narrow", torch::nn::Linear(4 * width, width))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    // Symbolic where the sizes of `x` are, and plain numbers elsewhere.
    const c10::SymInt batch = x.sym_size(0), tokens = x.sym_size(1), width = x.sym_size(2);
    const auto split = [&](const torch::Tensor& part) {
      return part.view_symint({batch, tokens, heads, width / heads}).transpose(1, 2);
    };
    const auto parts = project(norm1(x)).chunk(3, -1);
    const auto scores = split(parts[0]).matmul(split(parts[1]).transpose(2, 3)) * 0.25;
    const auto seen = torch::softmax(scores, -1).matmul(split(parts[2]));
    const auto h = x + join(seen.transpose(1, 2).reshape_symint({batch, tokens, width}));
    return h + narrow(torch::gelu(widen(norm2(h))));
  }

  int64_t heads;
  torch::nn::LayerNorm norm1, norm2;
  torch::nn::Linear project, join, widen, narrow;
};

void run(int argc, char** argv) {
  constexpr int64_t kWords = 1000, kWidth = 64, kHeads = 4, kClasses = 5;
  constexpr int64_t kMostTexts = 16, kMostTokens = 64;
  bool explain = false;
  examples::Program program("encode_requests",
                            "Serves an encoder to requests of changing batch and length.", 200);
  program.option("explain", explain, "Print what became of the program.");
  program.parse(argc, argv);
  const auto device = program.device();
  const torch::NoGradGuard no_grad;

  torch::nn::Embedding words(kWords, kWidth);
  auto first = std::make_shared<Block>(kWidth, kHeads), second = std::make_shared<Block>(kWidth, kHeads);
  torch::nn::Linear head(kWidth, kClasses);
  for (torch::nn::Module* module :
       {static_cast<torch::nn::Module*>(words.get()), static_cast<torch::nn::Module*>(first.get()),
        static_cast<torch::nn::Module*>(second.get()), static_cast<torch::nn::Module*>(head.get())}) {
    module->to(device);
  }

  std::mt19937_64 random(1);
  const auto between = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  double sum = 0;
  while (program.next_step()) {
    const int64_t texts = between(2, kMostTexts), tokens = between(4, kMostTokens);
    auto request = torch::randint(kWords, {texts, tokens}, torch::kLong).to(device);
    if (device.is_lazy()) {
      reprise::mark_dynamic(request, 0, {.name = "texts", .least = 1, .most = kMostTexts});
      reprise::mark_dynamic(request, 1, {.name = "tokens", .least = 1, .most = kMostTokens});
    }
    const auto h = second->forward(first->forward(words(request)));
    sum += torch::log_softmax(head(h.mean(1)), -1).max().cpu().item<double>();
    if (program.log_due()) program.log({{"mean", sum / static_cast<double>(program.step())}});
  }
  program.finish();
  if (explain) std::printf("%s", reprise::explain().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
