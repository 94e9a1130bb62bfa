#include "digits.h"

#include <ATen/CPUGeneratorImpl.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

namespace examples {

namespace {

constexpr double kBrightestPixel = 16.0;
constexpr uint64_t kSplitSeed = 20;

/// Reads a file of unsigned bytes in the IDX format, uint8 of the shape it names.
torch::Tensor read_idx(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path, "; tools/export_digits.py writes it");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};

  const auto header = [&](size_t word) {
    uint32_t value = 0;
    for (size_t i = 4 * word; i < 4 * word + 4; ++i) {
      value = value << 8 | static_cast<unsigned char>(bytes[i]);
    }
    return value;
  };
  constexpr uint32_t kUnsignedBytes = 0x08;
  const bool is_idx = bytes.size() >= 4 && header(0) >> 8 == kUnsignedBytes;
  const size_t dimensions = is_idx ? header(0) & 0xff : 0;
  const size_t begin = 4 + 4 * dimensions;
  TORCH_CHECK(is_idx && bytes.size() >= begin, path, ": expected an IDX file of unsigned bytes");

  std::vector<int64_t> sizes;
  int64_t count = 1;
  for (size_t i = 1; i <= dimensions; ++i) {
    sizes.push_back(header(i));
    count *= sizes.back();
  }
  TORCH_CHECK(
      static_cast<int64_t>(bytes.size() - begin) == count,
      path, ": expected ", count, " bytes after the header, got ", bytes.size() - begin);
  auto tensor = torch::empty(sizes, torch::kUInt8);
  std::memcpy(tensor.data_ptr(), bytes.data() + begin, static_cast<size_t>(count));
  return tensor;
}

}  // namespace

Digits Digits::select(const torch::Tensor& indices) const {
  return {images.index_select(0, indices), labels.index_select(0, indices)};
}

Digits Digits::to(torch::Device device) const {
  return {images.to(device), labels.to(device)};
}

Digits load_digits(const std::string& folder) {
  const auto images = read_idx(folder + "/digits-images.idx3-ubyte");
  const auto labels = read_idx(folder + "/digits-labels.idx1-ubyte");
  TORCH_CHECK(
      images.dim() == 3 && images.size(1) == kDigitSize && images.size(2) == kDigitSize &&
          labels.dim() == 1 && labels.size(0) == images.size(0),
      folder, ": expected 8×8 images with a label each, got images ", images.sizes(),
      " and labels ", labels.sizes());
  return {images.unsqueeze(1).to(torch::kFloat) / kBrightestPixel, labels.to(torch::kLong)};
}

DigitsSplit split(const Digits& digits, int64_t test_count) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(kSplitSeed);
  const auto order = torch::randperm(digits.count(), generator);
  const auto parts = order.split_with_sizes({digits.count() - test_count, test_count});
  return {digits.select(parts[0]), digits.select(parts[1])};
}

BatchSampler::BatchSampler(int64_t count, int64_t batch)
    : batch_(batch), order_(torch::randperm(count)) {
  TORCH_CHECK(
      0 < batch && batch <= count,
      "expected a batch of 1 to ", count, " examples, got ", batch);
}

torch::Tensor BatchSampler::next() {
  if (position_ + batch_ > order_.size(0)) {
    order_ = torch::randperm(order_.size(0));
    position_ = 0;
  }
  position_ += batch_;
  return order_.slice(/*dim=*/0, position_ - batch_, position_);
}

}  // namespace examples
