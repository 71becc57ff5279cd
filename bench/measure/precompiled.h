// What most sources of bench and of its tests include from other projects, compiled once (flashmla_add_headers). No source
// includes it: each still names what it uses, and builds without it, as with a compiler cache.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

// The largest functions in them are in no other object than precompiled.cpp's. Their names are those of these versions.
#if FMT_VERSION / 10000 == 9
extern template void fmt::detail::vformat_to<char>(fmt::detail::buffer<char>&, fmt::string_view,
                                                   fmt::format_args, fmt::detail::locale_ref);
#endif
#if NLOHMANN_JSON_VERSION_MAJOR == 3 && NLOHMANN_JSON_VERSION_MINOR == 11
extern template class nlohmann::basic_json<>;
extern template nlohmann::json nlohmann::json::parse<const std::string&>(
    const std::string&, nlohmann::json::parser_callback_t, bool, bool);
extern template nlohmann::json nlohmann::json::parse<std::string>(std::string&&,
                                                                  nlohmann::json::parser_callback_t,
                                                                  bool, bool);
#endif
