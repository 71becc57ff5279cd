// The functions that precompiled.h leaves out of all other objects.
#include "bench/measure/precompiled.h"

#if FMT_VERSION / 10000 == 9
template void fmt::detail::vformat_to<char>(fmt::detail::buffer<char>&, fmt::string_view,
                                            fmt::format_args, fmt::detail::locale_ref);
#endif
#if NLOHMANN_JSON_VERSION_MAJOR == 3 && NLOHMANN_JSON_VERSION_MINOR == 11
template class nlohmann::basic_json<>;
template nlohmann::json nlohmann::json::parse<const std::string&>(const std::string&,
                                                                  nlohmann::json::parser_callback_t,
                                                                  bool, bool);
template nlohmann::json nlohmann::json::parse<std::string>(std::string&&,
                                                           nlohmann::json::parser_callback_t, bool,
                                                           bool);
#endif
