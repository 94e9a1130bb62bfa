#include "text.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

namespace examples {

Text load_text(const std::string& folder) {
  const std::string path = folder + "/reference.txt";
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  TORCH_CHECK(!content.empty(), "cannot read ", path, "; tools/export_text.py writes it");

  Text text;
  const std::set<char> alphabet(content.begin(), content.end());
  text.alphabet.assign(alphabet.begin(), alphabet.end());
  text.tokens = torch::empty({static_cast<int64_t>(content.size())}, torch::kLong);
  std::transform(
      content.begin(), content.end(), text.tokens.mutable_data_ptr<int64_t>(),
      [&](char c) { return static_cast<int64_t>(text.alphabet.find(c)); });
  return text;
}

TextBatch draw_batch(const Text& text, int64_t batch, int64_t length) {
  TORCH_CHECK(
      batch > 0 && 0 < length && length < text.tokens.size(0),
      "expected a batch of stretches shorter than the text of ", text.tokens.size(0),
      " characters, got ", batch, " of ", length);
  const auto starts = torch::randint(text.tokens.size(0) - length, {batch, 1}, torch::kLong);
  const auto indices = starts + torch::arange(length + 1);
  const auto stretches = text.tokens.index({indices});
  return {stretches.slice(/*dim=*/1, 0, length), stretches.slice(/*dim=*/1, 1)};
}

}  // namespace examples
