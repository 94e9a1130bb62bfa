/// The English text that tools/export_text.py writes at set-up, as characters.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>

namespace examples {

struct Text {
  std::string alphabet;  ///< The characters that occur, sorted; a token indexes it.
  torch::Tensor tokens;  ///< int64 [characters].

  int64_t vocabulary() const { return static_cast<int64_t>(alphabet.size()); }
};

/// Stretches of text and what follows each character of them, both int64 [batch, length].
struct TextBatch {
  torch::Tensor inputs;
  torch::Tensor targets;
};

/// Reads `folder`/reference.txt. Throws c10::Error when it is missing or empty.
Text load_text(const std::string& folder);

/// Draws `batch` stretches of `length` characters from anywhere in the text.
TextBatch draw_batch(const Text& text, int64_t batch, int64_t length);

}  // namespace examples
