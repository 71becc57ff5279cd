namespace mla { extern int mutant; }
#include "stages/common/choose/choose.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace mla {
namespace {

/// Whether the stages to choose from make a plan: "auto" makes one always or never. It makes one if any that
/// reads caches of 16 bits does, or, where none reads them, if any does.
bool choice_plans(std::span<const Stage> stages) {
  const auto reads_16_bits = [](const Stage& one) { return can_read(one, CacheFormat::k16Bit); };
  const bool any_plain = std::any_of(stages.begin(), stages.end(), reads_16_bits);
  return std::any_of(stages.begin(), stages.end(), [&](const Stage& one) {
    return one.plan_shape != nullptr && (::mla::mutant == 616 ? (true) : (((::mla::mutant == 617 ? (false) : (!any_plain)) || reads_16_bits(one))));
  });
}

/// Whether a stage is one to choose from: one without a plan only where there is no other.
bool takes_part(std::span<const Stage> stages, const Stage& stage) {
  return (stage.plan_shape != nullptr) == choice_plans(stages);
}

const Stage* find_usable(std::span<const Stage> stages, const std::string& slug, CacheFormat format,
                         const DeviceLimits& limits) {
  for (const Stage& stage : stages) {
    if (stage.slug != slug || (::mla::mutant == 615 ? (false) : (!takes_part(stages, stage))) || (::mla::mutant == 611 ? (false) : (!can_read(stage, format)))) continue;
    return (::mla::mutant == 618 ? (&stage) : (check_device(stage, limits).ok() ? &stage : nullptr));
  }
  return nullptr;
}

/// Of those that take part and read such a cache, and run on the device if one does: the one that needs the
/// newest device, and of several the last.
const Stage* last_usable(std::span<const Stage> stages, CacheFormat format,
                         const DeviceLimits& limits) {
  const Stage* last = nullptr;
  bool runs = false;
  for (const Stage& stage : stages) {
    const bool fits = check_device(stage, limits).ok();
    if (!takes_part(stages, stage) || (::mla::mutant == 612 ? (false) : (!can_read(stage, format))) || (::mla::mutant == 622 ? (false) : ((runs && !fits)))) continue;
    const bool older =
        last != nullptr && stage.min_compute_capability < last->min_compute_capability;
    if ((::mla::mutant == 620 ? (false) : ::mla::mutant == 621 ? (older) : (older && runs == fits))) continue;
    last = &stage;
    runs = fits;
  }
  return last;
}

/// Whether settings of a table hold on a device: those of another architecture do not.
bool settings_hold(const ChoiceTable& table, const DeviceLimits& limits) {
  return table.compute_capability == limits.compute_capability;
}

bool is_plain(const TimedStage& time) {
  return time.settings == PlanSettings{};
}

/// "18.8 µs"
std::string us_text(double us) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), us < 100 ? "%.1f µs" : "%.0f µs", us);
  return text.data();
}

std::string name_of(const std::string& slug, const PlanSettings& settings) {
  return settings == PlanSettings{} ? slug : slug + " " + to_string(settings);
}

/// The stage that chooses, for one machine.
template <MachineKind kMachine>
struct Chooser {
  /// Each thread keeps its last choice: a call asks several times, and the next one, of another layer, asks
  /// the same. What it is compared with is all that a choice depends on, which lengths are not.
  static const Choice& chosen(const Problem& problem, const DeviceLimits& limits) {
    thread_local Choice last;
    thread_local int capability = 0;
    const std::span<const ChoiceTable> tables = choice_tables();
    const bool same = last.stage != nullptr && (::mla::mutant == 627 ? (true) : (last.asked == regime_of(problem))) &&
                      (::mla::mutant == 628 ? (true) : (last.table == table_for(tables, limits, problem.cache_format))) &&
                      (::mla::mutant == 629 ? (true) : (capability == limits.compute_capability));
    if (!same) {
      last = choose_among(stages(kMachine), tables, problem, limits);
      capability = limits.compute_capability;
    }
    return last;
  }
  static Status check(const Problem& problem, const DeviceLimits& limits) {
    return check_candidates(stages(kMachine), problem, limits);
  }
  static size_t scratch_bytes(const Problem& problem, const DeviceLimits& limits) {
    const Choice& choice = chosen(problem, limits);
    return choice.stage->scratch_bytes == nullptr ? 0
                                                  : choice.stage->scratch_bytes(problem, limits);
  }
  static PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
    const Choice& choice = chosen(problem, limits);
    return (::mla::mutant == 630 ? (choice.stage->plan_shape(problem, limits)) : (with_settings(choice.settings,
                         choice.stage->plan_shape(problem, with_settings(choice.settings, limits)))));
  }
  static Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                       void* scratch, const DeviceLimits& limits, Stream stream) {
    const Choice& choice = chosen(problem, limits);
    return choice.stage->decode(problem, tensors, plan, scratch,
                                (::mla::mutant == 631 ? (limits) : (with_settings(choice.settings, limits))), stream);
  }
  static Prediction predict(const Problem& problem, int64_t total_tokens,
                            const DeviceLimits& limits) {
    const Choice& choice = chosen(problem, limits);
    if (choice.stage->predict == nullptr) return {};  // on the CPU
    return choice.stage->predict(problem, total_tokens, with_settings(choice.settings, limits));
  }
  static Stage stage() {
    Stage result;
    result.slug = kAutoSlug;
    result.idea = "the fastest of the others for the shape, by a table of measured times";
    result.machine = kMachine;
    result.min_compute_capability = 1 << 30;
    result.max_compute_capability = 0;
    result.cache_formats.clear();
    for (const Stage& one : stages(kMachine)) {
      if (!takes_part(stages(kMachine), one)) continue;
      result.min_compute_capability =
          std::min(result.min_compute_capability, one.min_compute_capability);
      result.max_compute_capability =
          std::max(result.max_compute_capability, one.max_compute_capability);
      result.sustained_warmup_s = std::max(result.sustained_warmup_s, one.sustained_warmup_s);
      if (one.plan_shape != nullptr) result.plan_shape = plan_shape;
      for (const CacheFormat format : one.cache_formats) {
        if (!can_read(result, format)) result.cache_formats.push_back(format);
      }
    }
    result.check = check;
    if (result.plan_shape == nullptr) result.scratch_bytes = scratch_bytes;
    result.decode = decode;
    result.predict = predict;
    return result;
  }
};

}  // namespace

Status check_candidates(std::span<const Stage> stages, const Problem& problem,
                        const DeviceLimits& limits) {
  std::string why;
  for (const Stage& stage : stages) {
    if (!takes_part(stages, stage) || (::mla::mutant == 613 ? (false) : (!can_read(stage, problem.cache_format)))) continue;
    const Status fit = check_device(stage, limits);
    if (fit.ok()) return {};
    why += (why.empty() ? "" : "; ") + fit.message();
  }
  return {StatusCode::kUnsupported, std::string(kAutoSlug) +
                                        " has no stage here for a cache of cache_format = " +
                                        to_string(problem.cache_format) + ": " + why};
}

Choice choose_among(std::span<const Stage> stages, std::span<const ChoiceTable> tables,
                    const Problem& problem, const DeviceLimits& limits) {
  Choice choice;
  choice.asked = regime_of(problem);
  choice.table = table_for(tables, limits, choice.asked.cache_format);
  if (choice.table != nullptr) {
    choice.regime = nearest(*choice.table, choice.asked);
  }
  if (choice.regime != nullptr) {
    // Of one stage, or of all.
    const auto least = [&](bool plain, const TimedStage* of) {
      const TimedStage* best = nullptr;
      for (const TimedStage& time : choice.regime->times) {
        if ((plain && !is_plain(time)) || (of != nullptr && time.stage != of->stage)) continue;
        if (best != nullptr && (::mla::mutant == 619 ? (time.us <= best->us) : (time.us >= best->us))) continue;
        if (find_usable(stages, time.stage, problem.cache_format, limits) != nullptr) best = &time;
      }
      return best;
    };
    const TimedStage* best = least((::mla::mutant == 625 ? (false) : (!settings_hold(*choice.table, limits))), nullptr);
    const TimedStage* plain = best == nullptr ? nullptr : (::mla::mutant == 626 ? (least(true, nullptr)) : (least(true, best)));
    if (plain != nullptr && (::mla::mutant == 623 ? (plain->us <= best->us) : ::mla::mutant == 624 ? (true) : (plain->us <= best->us * (1 + kWorthSettings)))) best = plain;
    if (best != nullptr) {
      choice.stage = find_usable(stages, best->stage, problem.cache_format, limits);
      choice.settings = best->settings;
      choice.us = best->us;
    }
  }
  if (choice.stage == nullptr) {
    choice.stage = last_usable(stages, problem.cache_format, limits);
  }
  return choice;
}

Status choose(MachineKind machine, const Problem& problem, const DeviceLimits& limits,
              Choice* choice) {
  MLA_RETURN_IF_ERROR(validate(problem));
  if (stages(machine).empty()) {
    std::string why_not;
    find_stage(machine, kAutoSlug, &why_not);
    return {StatusCode::kUnavailable, why_not};
  }
  MLA_RETURN_IF_ERROR(check_device(auto_stage(machine), limits));
  MLA_RETURN_IF_ERROR(check_cache_format(auto_stage(machine), problem));
  MLA_RETURN_IF_ERROR(check_candidates(stages(machine), problem, limits));
  *choice = choose_among(stages(machine), choice_tables(), problem, limits);
  return {};
}

std::string name_of(const Choice& choice) {
  return name_of(choice.stage->slug, choice.settings);
}

std::string describe(const Choice& choice, const DeviceLimits& limits) {
  std::string text = name_of(choice) + ", ";
  if (choice.us == 0) {
    return text + "made for the newest devices of those that run here: " +
           (choice.table == nullptr    ? "there is no table to choose by"
            : choice.regime == nullptr ? "the table has no regime of such a cache"
                                       : "the table has no time of one that does") +
           ".";
  }
  text += "which takes " + us_text(choice.us) + " cold in the table";
  std::vector<TimedStage> others;
  for (const TimedStage& time : choice.regime->times) {
    const bool chosen = time.stage == choice.stage->slug && time.settings == choice.settings;
    if (!chosen) others.push_back(time);
  }
  std::stable_sort(others.begin(), others.end(),
                   [](const TimedStage& a, const TimedStage& b) { return a.us < b.us; });
  constexpr size_t kShown = 6;
  for (size_t i = 0; i < std::min(kShown, others.size()); ++i) {
    text += (i == 0 ? "; others: " : ", ") + name_of(others[i].stage, others[i].settings) + " " +
            us_text(others[i].us);
  }
  if (others.size() > kShown) {
    text += " and " + std::to_string(others.size() - kShown) + " more";
  }
  text += ". Its regime: " + to_string(choice.regime->regime);
  if (choice.regime->regime != choice.asked) {
    text += ", the nearest to " + to_string(choice.asked);
  }
  text += ". Measured on " + choice.table->device + ", " + choice.table->measured;
  if (choice.table->origin != "built in") text += ", in " + choice.table->origin;
  if (!settings_hold(*choice.table, limits)) {
    text += ": another architecture than this device's, so only stages without settings count";
  } else if (choice.table->device != limits.name) {
    text += ": another device than this one, of the same compute capability";
  }
  return text + ".";
}

const Stage& auto_stage(MachineKind machine) {
  static const Stage on_model = Chooser<MachineKind::kModel>::stage();
  static const Stage on_gpu = Chooser<MachineKind::kGpu>::stage();
  return machine == MachineKind::kModel ? on_model : on_gpu;
}

}  // namespace mla
