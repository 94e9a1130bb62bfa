#include "interchange/pt2_archive.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

namespace reprise {
namespace {

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
  return names_in(records_, "data/aotinductor/", "/");
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

void write_package(const std::string& path, Pt2Archive* others, Pt2Archive& program, const std::string& entry) {
  const std::string folder = "data/aotinductor/", own = folder + program.compiled_programs().at(0) + "/",
                    named = folder + entry + "/";
  const std::string partial = path + ".partial-" + std::to_string(::getpid());
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
      for (const std::string& record : others->records()) {
        if (!record.starts_with(named)) copy(*others, record, record);
      }
    }
    for (const std::string& record : program.records()) {
      copy(program, record, record.starts_with(own) ? named + record.substr(own.size()) : record);
    }
    writer.writeEndOfFile();
  }
  std::filesystem::rename(partial, path);
}

}  // namespace reprise
