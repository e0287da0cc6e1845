// Which assignments to keep within a latency budget, jointly with the bandwidth. Knows nothing of Python.
//
// h_k(n), the hertz that n tokens take on device k, is convex in n, and the weight of its n heaviest assignments is
// concave: on each device the weight per extra hertz falls from one assignment to the next. docs/solver.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <queue>
#include <vector>

#include "by_device.hpp"
#include "hertz.hpp"

namespace wdmoe {
namespace detail {

inline constexpr double kHertzSlack = 1e-9;  // of the band: what rounding may take
inline constexpr double kBudgetClose = 1e-9;  // where a search for a budget ends
inline constexpr double kShortest = 1e-30;   // seconds: less than any link takes

// Takes assignments by weight per extra hertz, on top of a load that is there already.
class HertzFilling {
public:
    HertzFilling(const ByDevice& lists, const std::vector<std::size_t>& base, HertzTable& table)
        : lists_(lists), base_(base), table_(table), taken(base.size(), 0) {}

    // For the greedy choice: whatever fits; a device whose next one does not is passed over. Leaves `taken`.
    void whole(double left_hz) { merge(left_hz, false); }

    // The linear relaxation's value: up to the first that does not fit, of which a part is taken.
    double relaxed(double left_hz) { return merge(left_hz, true); }

private:
    struct Next {
        double density;
        std::size_t device;
        bool operator<(const Next& other) const {  // the heap's top: the densest, of equals the first device's
            return density != other.density ? density < other.density : device > other.device;
        }
    };
    const ByDevice& lists_;
    const std::vector<std::size_t>& base_;
    HertzTable& table_;

    double weight(std::size_t k, std::size_t i) const { return lists_.entries[lists_.begin[k] + i].weight; }
    double extra_hz(std::size_t k, std::size_t i) {
        return table_.at(k, base_[k] + i + 1) - table_.at(k, base_[k] + i);
    }
    double density(std::size_t k, std::size_t i) {
        const double hertz = extra_hz(k, i);
        return hertz > 0.0 ? weight(k, i) / hertz : kNever;
    }

    // How many of [low, high) on device k are at least (or, if `strict`, more) dense than `bar`; density falls.
    std::size_t dense(std::size_t k, std::size_t low, std::size_t high, double bar, bool strict) {
        while (low < high) {
            const std::size_t middle = (low + high) / 2;
            const double found = density(k, middle);
            if (strict ? found > bar : found >= bar) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    double spent(const std::vector<std::size_t>& count) {
        double sum = 0.0;
        for (std::size_t k = 0; k < count.size(); ++k) {
            sum += table_.at(k, base_[k] + count[k]) - table_.at(k, base_[k]);
        }
        return sum;
    }

    // (devices,) how many the device could do with the whole band.
    std::vector<std::size_t> possible() const {
        std::vector<std::size_t> most(base_.size(), 0);
        for (std::size_t k = 0; k < most.size(); ++k) {
            std::size_t low = 0, high = lists_.count(k);
            while (low < high) {
                const std::size_t middle = (low + high + 1) / 2;
                if (table_.can(k, base_[k] + middle)) low = middle;
                else high = middle - 1;
            }
            most[k] = low;
        }
        return most;
    }

    // Most of the way at once: counts that any merge by density passes through, found by bisection on the density.
    void leap(std::vector<std::size_t> high, double left_hz) {
        if (spent(high) <= left_hz) {
            taken = high;
            return;
        }
        std::vector<std::size_t> tried(high.size());
        for (int step = 0; step < 64; ++step) {
            std::size_t widest = 0, open = 0;
            for (std::size_t k = 0; k < high.size(); ++k) {
                open += high[k] - taken[k];
                if (high[k] - taken[k] > high[widest] - taken[widest]) widest = k;
            }
            if (open <= 2 * high.size()) return;
            const double bar = density(widest, (taken[widest] + high[widest] - 1) / 2);
            for (const bool strict : {false, true}) {
                for (std::size_t k = 0; k < high.size(); ++k) tried[k] = dense(k, taken[k], high[k], bar, strict);
                if (spent(tried) <= left_hz) {
                    taken = tried;
                    if (strict) return;  // those that are just as dense do not all fit
                    break;
                }
                if (strict) high = tried;
            }
        }
    }

    double merge(double left_hz, bool relaxed) {
        std::fill(taken.begin(), taken.end(), 0);
        const std::vector<std::size_t> most = possible();
        leap(most, left_hz);
        double value = 0.0;
        std::priority_queue<Next> next;
        left_hz -= spent(taken);
        for (std::size_t k = 0; k < most.size(); ++k) {
            for (std::size_t i = 0; relaxed && i < taken[k]; ++i) value += weight(k, i);
            if (taken[k] < most[k]) next.push({density(k, taken[k]), k});
        }
        while (!next.empty()) {
            const std::size_t k = next.top().device;
            const double hertz = extra_hz(k, taken[k]);
            next.pop();
            if (hertz <= left_hz) {
                left_hz -= hertz;
                value += weight(k, taken[k]);
                if (++taken[k] < most[k]) next.push({density(k, taken[k]), k});
            } else if (relaxed) {
                return value + weight(k, taken[k]) * std::max(left_hz, 0.0) / hertz;
            }
        }
        return value;
    }

public:
    std::vector<std::size_t> taken;  // (devices,)
};

}  // namespace detail

class BudgetChooser {
public:
    // links: see BandwidthTask.
    BudgetChooser(const Assignments& given, const double* links, bool flat, double total_hz)
        : given_(given), total_hz_(total_hz * (1.0 + detail::kHertzSlack)), all_(heaviest_first(given)),
          table_(links, given.devices, flat, total_hz_, counts(all_)), last_(given.tokens), load_(given.devices) {
        for (std::size_t t = 0; t < given.tokens; ++t) {
            heaviest_.push_back(heaviest_of(given.device + t * given.top_k, given.weight + t * given.top_k, given.top_k));
        }
    }

    // Within a budget the heaviest choice that is found. False, where one assignment of each token does not fit: then
    // it is the one cheapest on the air.
    bool choose(double budget_s) {
        table_.begin(budget_s);
        const bool fits = choose_last();
        if (fits) {
            split_rest();
            detail::HertzFilling filling(rest_, load_, table_);
            filling.whole(total_hz_ - hertz(load_));
            taken_ = filling.taken;
        } else {
            taken_.assign(given_.devices, 0);
        }
        return fits;
    }

    // Of the last choice, weight kept.
    double weight() const {
        double sum = 0.0;
        for (std::size_t t = 0; t < given_.tokens; ++t) {
            if (last_[t] < given_.top_k) sum += given_.weight[t * given_.top_k + last_[t]];
        }
        for (std::size_t k = 0; k < given_.devices; ++k) {
            for (std::size_t i = 0; i < taken_[k]; ++i) sum += rest_.entries[rest_.begin[k] + i].weight;
        }
        return sum;
    }

    // kept (tokens, top_k) of the last choice.
    void write(std::uint8_t* kept) const {
        std::fill_n(kept, given_.size(), std::uint8_t{0});
        for (std::size_t t = 0; t < given_.tokens; ++t) {
            if (last_[t] < given_.top_k) kept[t * given_.top_k + last_[t]] = 1;
        }
        for (std::size_t k = 0; k < given_.devices; ++k) {
            for (std::size_t i = 0; i < taken_[k]; ++i) kept[rest_.entries[rest_.begin[k] + i].item] = 1;
        }
    }

    // No choice within the budget keeps more.
    double upper_bound(double budget_s) {
        table_.begin(budget_s);
        return bound_of_table();
    }

    // After `choose`, for its budget.
    double bound_of_table() {
        const std::vector<std::size_t> none(given_.devices, 0);
        return detail::HertzFilling(all_, none, table_).relaxed(total_hz_);
    }

private:
    const Assignments given_;
    const double total_hz_;
    const ByDevice all_;
    HertzTable table_;
    std::vector<std::size_t> heaviest_;  // (tokens,) slot, top_k where there is none
    std::vector<std::size_t> last_;      // (tokens,) slot that stays whatever happens
    std::vector<std::size_t> load_;      // (devices,) of those
    ByDevice rest_;                      // all others
    std::vector<std::size_t> taken_;     // (devices,) how many of the rest

    static std::vector<std::size_t> counts(const ByDevice& lists) {
        std::vector<std::size_t> out;
        for (std::size_t k = 0; k + 1 < lists.begin.size(); ++k) out.push_back(lists.count(k));
        return out;
    }

    double hertz(const std::vector<std::size_t>& load) {
        double sum = 0.0;
        for (std::size_t k = 0; k < load.size(); ++k) sum += table_.at(k, load[k]);
        return sum;
    }

    // Whether those last assignments fit together; sets load_.
    bool fit() {
        std::fill(load_.begin(), load_.end(), 0);
        for (std::size_t t = 0; t < given_.tokens; ++t) {
            if (last_[t] < given_.top_k) ++load_[given_.device[t * given_.top_k + last_[t]]];
        }
        for (std::size_t k = 0; k < load_.size(); ++k) {
            if (!table_.can(k, load_[k])) return false;
        }
        return hertz(load_) <= total_hz_;
    }

    // Each token's assignment of greatest `weight_factor` weight - price[device].
    void take_best(double weight_factor, const std::vector<double>& price) {
        for (std::size_t t = 0; t < given_.tokens; ++t) {
            const std::int32_t* device = given_.device + t * given_.top_k;
            const double* weight = given_.weight + t * given_.top_k;
            double most = -kNever;
            last_[t] = heaviest_[t];
            for (std::size_t j = 0; j < given_.top_k; ++j) {
                const double value = device[j] < 0 ? -kNever : weight_factor * weight[j] - price[device[j]];
                if (value > most) most = value, last_[t] = j;
            }
        }
    }

    // One assignment of each token: the heaviest, or where the band is short, cheaper ones at the least price of hertz
    // at which all fit.
    bool choose_last() {
        last_ = heaviest_;
        if (fit()) return true;
        std::vector<double> each(given_.devices), price(given_.devices);
        for (std::size_t k = 0; k < given_.devices; ++k) each[k] = all_.count(k) > 0 ? table_.at(k, 1) : kNever;
        take_best(0.0, each);
        if (!fit()) return false;
        double high = dearest(each), low = 1e-9 * high;  // less is too little to matter
        std::vector<std::size_t> found = last_;
        for (int step = 0; step < 40 && high > low * (1.0 + 1e-9); ++step) {
            const double middle = std::sqrt(low * high);
            for (std::size_t k = 0; k < given_.devices; ++k) price[k] = middle * each[k];
            take_best(1.0, price);
            if (fit()) high = middle, found = last_;
            else low = middle;
        }
        last_ = found;
        return fit();
    }

    // The least price at which every token prefers its cheapest device.
    double dearest(const std::vector<double>& each) const {
        double most = 0.0;
        for (std::size_t t = 0; t < given_.tokens; ++t) {
            const std::int32_t* device = given_.device + t * given_.top_k;
            const double* weight = given_.weight + t * given_.top_k;
            if (last_[t] == given_.top_k) continue;
            const std::size_t cheapest = last_[t];
            for (std::size_t j = 0; j < given_.top_k; ++j) {
                const double dearer = device[j] < 0 ? 0.0 : each[device[j]] - each[device[cheapest]];
                if (dearer > 0.0) most = std::max(most, (weight[j] - weight[cheapest]) / dearer);
            }
        }
        return 2.0 * most;
    }

    void split_rest() {
        rest_.begin.assign(1, 0);
        rest_.entries.clear();
        rest_.entries.reserve(all_.entries.size());
        for (std::size_t k = 0; k < given_.devices; ++k) {
            for (std::size_t i = all_.begin[k]; i < all_.begin[k + 1]; ++i) {
                const ByDevice::Entry& entry = all_.entries[i];
                if (last_[entry.item / given_.top_k] != entry.item % given_.top_k) rest_.entries.push_back(entry);
            }
            rest_.begin.push_back(rest_.entries.size());
        }
    }
};

struct BudgetAnswer {
    double upper_bound, lower_bound_s;
    bool fits;
};

inline BudgetAnswer choose_within_budget(const Assignments& given, const double* links, bool flat, double total_hz,
                                         double budget_s, std::uint8_t* kept) {
    BudgetChooser chooser(given, links, flat, total_hz);
    const bool fits = chooser.choose(budget_s);
    chooser.write(kept);
    return {fits ? chooser.bound_of_table() : 0.0, 0.0, fits};
}

// The least budget within which `goal` is kept: between lower_bound_s, below which it is not even conceivable, and
// `most_s`, within which everything fits.
inline BudgetAnswer choose_least_budget(const Assignments& given, const double* links, bool flat, double total_hz,
                                        double goal, double most_s, std::uint8_t* kept) {
    BudgetChooser chooser(given, links, flat, total_hz);
    const auto search = [](double low, double high, double first, auto holds) {
        double middle = first;
        while (high - low > detail::kBudgetClose * high && high > detail::kShortest) {
            (holds(middle) ? high : low) = middle;
            middle = low > 0.0 ? 0.5 * (low + high) : 0.5 * high;
        }
        return std::pair{low, high};
    };
    const double bound_s =
        search(0.0, most_s, 0.5 * most_s, [&](double budget_s) { return chooser.upper_bound(budget_s) >= goal; }).first;
    const double best_s = search(bound_s, most_s, std::min(bound_s * (1.0 + 1e-4), most_s), [&](double budget_s) {
                              return chooser.choose(budget_s) && chooser.weight() >= goal;
                          }).second;
    chooser.choose(best_s);
    chooser.write(kept);
    return {chooser.bound_of_table(), bound_s, true};
}

}  // namespace wdmoe
