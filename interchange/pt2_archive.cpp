#include "interchange/pt2_archive.h"

#include <torch/csrc/jit/serialization/pickle.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

namespace reprise {
namespace {

using Json = nlohmann::json;

constexpr const char* kPackages = "data/aotinductor/";
constexpr const char* kWeights = "data/weights/";
constexpr const char* kWeightPrefix = "weight_";

std::string config_of(const std::string& package) { return kPackages + package + "/weights_config.json"; }

/// The parts of the names that lie between `prefix` and `end`, each once.
std::vector<std::string> names_in(const std::vector<std::string>& records, const std::string& prefix,
                                  const std::string& end) {
  std::vector<std::string> names;
  for (const std::string& record : records) {
    if (!record.starts_with(prefix)) continue;
    const size_t stop = record.find(end, prefix.size());
    if (stop == std::string::npos) continue;
    std::string name = record.substr(prefix.size(), stop - prefix.size());
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(std::move(name));
  }
  return names;
}

std::unique_ptr<caffe2::serialize::PyTorchStreamReader> open(const std::string& path) {
  TORCH_CHECK(std::filesystem::is_regular_file(path), "reprise: '", path, "' is no file");
  try {
    return std::make_unique<caffe2::serialize::PyTorchStreamReader>(path);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "reprise: '", path, "' is no whole .pt2 archive: ", error.what_without_backtrace());
  }
}

}  // namespace

Pt2Archive::Pt2Archive(std::string path)
    : path_(std::move(path)), reader_(open(path_)), records_(reader_->getAllRecords()) {}

std::vector<std::string> Pt2Archive::exported_programs() const {
  return names_in(records_, "models/", ".json");
}

std::vector<std::string> Pt2Archive::compiled_programs() const {
  return names_in(records_, kPackages, "/");
}

bool Pt2Archive::has(const std::string& record) { return reader_->hasRecord(record); }

std::string Pt2Archive::text(const std::string& record) {
  TORCH_CHECK(has(record), "reprise: '", path_, "' has no record '", record, "'");
  const auto [data, size] = reader_->getRecord(record);
  return {static_cast<const char*>(data.get()), size};
}

c10::Storage Pt2Archive::storage(const std::string& record) {
  TORCH_CHECK(has(record), "reprise: '", path_, "' has no record '", record, "'");
  auto [data, size] = reader_->getRecord(record);
  return {c10::Storage::use_byte_size_t(), size, std::move(data)};
}

std::map<std::string, at::Tensor> Pt2Archive::weights(const std::string& package) {
  std::map<std::string, at::Tensor> out;
  if (!has(config_of(package))) return out;
  std::map<std::string, at::Tensor> read;  // by record: weights may be parts of one tensor
  const Json places = Json::parse(text(config_of(package)));
  for (const auto& [name, place] : places.items()) {
    const auto [found, is_new] = read.try_emplace(place.at(0).get<std::string>());
    if (is_new) {
      const std::string bytes = text(kWeights + found->first);
      found->second = torch::jit::pickle_load({bytes.begin(), bytes.end()}).toTensor();
    }
    out.emplace(name, found->second.as_strided(place.at(1).get<std::vector<int64_t>>(),
                                               place.at(2).get<std::vector<int64_t>>(), place.at(3).get<int64_t>()));
  }
  return out;
}

namespace {

/// Finds weights of an archive by their values, and names those that are new.
class WeightRecords {
 public:
  /// With those that `packages` of the archive use.
  WeightRecords(Pt2Archive* archive, const std::vector<std::string>& packages) : archive_(archive) {
    for (const std::string& package : packages) {
      if (!archive_->has(config_of(package))) continue;
      const Json places = Json::parse(archive_->text(config_of(package)));
      for (const auto& [name, place] : places.items()) {
        const auto record = place.at(0).get<std::string>();
        used_.insert(record);
        by_name_.emplace(name, record);
      }
    }
    if (archive_ == nullptr || archive_->exported_programs().empty()) return;
    for (const std::string& record : archive_->records()) {  // which of them these use is not looked up
      if (record.starts_with(kWeights)) used_.insert(record.substr(std::strlen(kWeights)));
    }
  }
  bool uses(const std::string& record) const { return used_.contains(record); }
  /// Where the weight lies, and whether it has to be written there.
  std::pair<std::string, bool> place_of(const std::string& name, const std::vector<char>& bytes) {
    const auto [begin, end] = by_name_.equal_range(name);
    for (auto known = begin; known != end; ++known) {
      if (archive_->text(kWeights + known->second) == std::string_view(bytes.data(), bytes.size())) {
        return {known->second, false};
      }
    }
    while (used_.contains(kWeightPrefix + std::to_string(next_))) ++next_;
    return {*used_.insert(kWeightPrefix + std::to_string(next_)).first, true};
  }

 private:
  Pt2Archive* archive_;
  std::set<std::string> used_;
  std::multimap<std::string, std::string> by_name_;
  size_t next_ = 0;
};

}  // namespace

void write_package(const std::string& path, Pt2Archive* others, Pt2Archive& program, const std::string& entry,
                   const std::vector<std::pair<std::string, at::Tensor>>& weights) {
  const std::string own = kPackages + program.compiled_programs().at(0) + "/", named = kPackages + entry + "/";
  const std::string partial = path + ".partial-" + std::to_string(::getpid());
  std::vector<std::string> kept = others == nullptr ? std::vector<std::string>() : others->compiled_programs();
  std::erase(kept, entry);
  WeightRecords records(others, kept);
  {
    caffe2::serialize::PyTorchStreamWriter writer(partial);
    const auto copy = [&](Pt2Archive& from, const std::string& record, const std::string& as) {
      // Written by the writer itself.
      if (record.starts_with(".data/") || record == "version") return;
      if (writer.getAllWrittenRecords().contains(as)) return;
      const std::string bytes = from.text(record);
      writer.writeRecord(as, bytes.data(), bytes.size());
    };
    if (others != nullptr) {
      const std::string weight = std::string(kWeights) + kWeightPrefix;
      for (const std::string& record : others->records()) {
        if (record.starts_with(named)) continue;
        if (record.starts_with(weight) && !records.uses(record.substr(std::strlen(kWeights)))) continue;
        copy(*others, record, record);
      }
    }
    for (const std::string& record : program.records()) {
      copy(program, record, record.starts_with(own) ? named + record.substr(own.size()) : record);
    }
    Json places = Json::object();
    for (const auto& [name, tensor] : weights) {
      const std::vector<char> bytes = torch::jit::pickle_save(tensor);
      const auto [record, is_new] = records.place_of(name, bytes);
      if (is_new) writer.writeRecord(kWeights + record, bytes.data(), bytes.size());
      places[name] = {record, tensor.sizes().vec(), tensor.strides().vec(), tensor.storage_offset()};
    }
    if (!weights.empty()) {
      const std::string text = places.dump();
      writer.writeRecord(config_of(entry), text.data(), text.size());
    }
    writer.writeEndOfFile();
  }
  std::filesystem::rename(partial, path);
}

}  // namespace reprise
