/// @file
/// Cache formats by name, on a command line.
#pragma once

#include <CLI/CLI.hpp>
#include <map>
#include <string>

#include "reference/cache_format.h"

namespace mla::bench {

/// Names to formats; `quantised`: not that of 16 bits.
inline CLI::CheckedTransformer format_names(bool quantised) {
  std::map<std::string, CacheFormat> formats;
  std::string names;
  for (const CacheFormat format : kCacheFormats) {
    if (quantised && !is_quantised(format)) continue;
    formats[to_string(format)] = format;
    names += (names.empty() ? "{" : ",") + std::string(to_string(format));
  }
  CLI::CheckedTransformer transformer(formats);
  transformer.description(names + "}");
  return transformer;
}

}  // namespace mla::bench
