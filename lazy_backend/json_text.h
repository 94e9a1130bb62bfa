/// \file
/// Text as a JSON string. What is written as JSON here is flat, and what is read
/// is read by Python.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

namespace reprise {

inline std::string json_text(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace reprise
