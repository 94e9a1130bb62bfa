/// Trains a small GPT on the characters of an English text, and writes it to a package that
/// plain_libtorch_runner runs: `export_gpt PATH [options]`.
#include "cpp_models/gpt.h"
#include "program.h"
#include "reprise/reprise.h"
#include "text.h"

#include <algorithm>

namespace {

namespace F = torch::nn::functional;

void train(cpp_models::Gpt& model, const examples::Text& text, examples::Program& program,
           int64_t context, torch::Device device) {
  constexpr int64_t kBatch = 4;
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-3));
  while (program.next_step()) {
    const auto [inputs, targets] = examples::draw_batch(text, kBatch, context);
    const auto logits = model->forward(inputs.to(device));
    const auto loss = F::cross_entropy(logits.flatten(0, 1), targets.to(device).flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (program.log_due()) program.log({{"loss", loss.item<double>()}});
  }
  program.finish();
}

/// The likeliest continuation, and the logits of each character of it.
std::vector<torch::Tensor> continued(cpp_models::Gpt& model, torch::Tensor tokens, int64_t length,
                                     torch::Device device) {
  std::vector<torch::Tensor> logits;
  for (int64_t k = 0; k < length; ++k) {
    logits.push_back(model->forward(tokens.to(device)).select(/*dim=*/1, -1).cpu());
    tokens = torch::cat({tokens, logits.back().argmax(-1, /*keepdim=*/true)}, 1);
  }
  return {tokens, torch::cat(logits)};
}

void run(int argc, char** argv) {
  TORCH_CHECK(argc > 1 && argv[1][0] != '-', "usage: export_gpt PATH [options]; PATH ends in .pt2");
  const std::string path = argv[1];
  cpp_models::GptOptions options;
  std::string target;
  examples::Program program("export_gpt PATH", "Trains a GPT and writes it to a package.", 100);
  program.option("context", options.context, "Characters in a stretch.");
  program.option("layers", options.layers, "Transformer blocks.");
  program.option("width", options.width, "Channels.");
  program.option("target", target, "GPU to compile for, such as sm_90; none: the device itself.");
  argv[1] = argv[0];
  program.parse(argc - 1, argv + 1);
  const auto device = program.device();
  TORCH_CHECK(device.is_lazy(), "what is exported runs on the lazy device: give --device lazy");

  const auto text = examples::load_text(program.data_folder());
  options.vocabulary = text.vocabulary();
  options.attention = cpp_models::Attention::kFused;
  cpp_models::Gpt model(options);
  model->to(device);
  train(model, text, program, options.context, device);

  torch::NoGradGuard no_grad;
  model->eval();
  const auto prompt = text.tokens.slice(/*dim=*/0, 0, options.context / 4).unsqueeze(0);
  auto example = prompt.to(device);
  reprise::mark_dynamic(example, 1, {.name = "length", .most = options.context});
  reprise::ExportOptions how{.input_names = {"tokens"}};
  if (!target.empty()) how.target = reprise::CompileTarget{.architecture = target};
  reprise::export_package(model, std::tuple(example), path, how);

  // For who runs it: what it should give, and the characters.
  auto expected = continued(model, prompt, options.context / 2, device);
  expected.insert(expected.begin(), prompt);
  expected.push_back(torch::tensor(std::vector<int64_t>(text.alphabet.begin(), text.alphabet.end())));
  torch::save(expected, path + ".expected");
  std::printf("%s and %s.expected are written\n", path.c_str(), path.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
