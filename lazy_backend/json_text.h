/// \file
/// Text as a JSON string, and numbers as text. What is written as JSON here is flat, and what is read
/// is read by Python.
#pragma once

#include <cmath>
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

/// Every bit of it, as Python's `float.fromhex` reads it.
inline std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char text[64];
  std::snprintf(text, sizeof text, "%a", value);
  return text;
}

}  // namespace reprise
