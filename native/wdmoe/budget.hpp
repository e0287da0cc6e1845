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
#include <tuple>
#include <utility>
#include <vector>

#include "by_device.hpp"
#include "hertz.hpp"

namespace wdmoe {
namespace detail {

inline constexpr double kHertzSlack = 1e-9;  // of the band: what rounding may take
inline constexpr double kBudgetClose = 1e-7;  // where a search for a budget ends: relative,
inline constexpr double kGapClose = 0.01;     // or to its distance from its lower bound
inline constexpr double kFirstStep = 1e-5;
inline constexpr double kShortest = 1e-30;    // seconds: less than any link takes

// The search for the price of a hertz where the band is too short for the heaviest of each token.
inline constexpr int kPriceSteps = 12;
inline constexpr double kPriceRise = 1.03;    // until a price is high enough, squared each time
inline constexpr double kPriceClose = 1.001;
inline constexpr double kWellUsed = 0.98;     // of the band: the rest is filled in anyway

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
                price = weight(k, taken[k]) / hertz;
                return value + weight(k, taken[k]) * std::max(left_hz, 0.0) / hertz;
            }
        }
        return value;
    }

public:
    std::vector<std::size_t> taken;  // (devices,)
    double price = 0.0;              // weight per hertz at which the relaxation stopped; 0 where all fits
};

}  // namespace detail

class BudgetChooser {
public:
    // links: see BandwidthTask.
    BudgetChooser(const Assignments& given, const double* links, bool flat, double total_hz)
        : given_(given), total_hz_(total_hz * (1.0 + detail::kHertzSlack)), all_(heaviest_first(given)),
          table_(links, given.devices, flat, total_hz_, counts(all_)), kept_(given.size()), load_(given.devices) {
        for (std::size_t t = 0; t < given.tokens; ++t) {
            heaviest_.push_back(heaviest_of(given.device + t * given.top_k, given.weight + t * given.top_k, given.top_k));
        }
    }

    // Within a budget the heaviest choice that is found. False, where one assignment of each token is not found to fit:
    // then it is that which is cheapest on the air.
    bool choose(double budget_s) {
        table_.begin(budget_s);
        take_heaviest();
        const bool easy = fit();
        if (!easy && !squeeze()) return false;
        split_rest();
        detail::HertzFilling filling(rest_, load_, table_);
        filling.whole(total_hz_ - hertz());
        for (std::size_t k = 0; k < given_.devices; ++k) {
            for (std::size_t i = 0; i < filling.taken[k]; ++i) kept_[rest_.entries[rest_.begin[k] + i].item] = 1;
            load_[k] += filling.taken[k];
        }
        if (!easy) exchange();
        return true;
    }

    // Of the last choice: (tokens, top_k), and its weight.
    const std::vector<std::uint8_t>& kept() const { return kept_; }
    double weight() const {
        double sum = 0.0;
        for (std::size_t i = 0; i < kept_.size(); ++i) sum += kept_[i] != 0 ? given_.weight[i] : 0.0;
        return sum;
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
    std::vector<std::uint8_t> kept_;     // (tokens, top_k)
    std::vector<std::size_t> load_;      // (devices,) of what is kept, before the rest is filled in
    ByDevice rest_;                      // all others

    static std::vector<std::size_t> counts(const ByDevice& lists) {
        std::vector<std::size_t> out;
        for (std::size_t k = 0; k + 1 < lists.begin.size(); ++k) out.push_back(lists.count(k));
        return out;
    }

    // The relaxation's price of a hertz, and how many assignments of each device it takes whole.
    std::pair<double, std::vector<std::size_t>> relaxed_choice() {
        const std::vector<std::size_t> none(given_.devices, 0);
        detail::HertzFilling filling(all_, none, table_);
        filling.relaxed(total_hz_);
        return {filling.price, filling.taken};
    }

    double hertz() {
        double sum = 0.0;
        for (std::size_t k = 0; k < load_.size(); ++k) sum += table_.at(k, load_[k]);
        return sum;
    }

    bool fit() {
        for (std::size_t k = 0; k < load_.size(); ++k) {
            if (!table_.can(k, load_[k])) return false;
        }
        return hertz() <= total_hz_;
    }

    void take_heaviest() {
        std::fill(kept_.begin(), kept_.end(), std::uint8_t{0});
        std::fill(load_.begin(), load_.end(), 0);
        for (std::size_t t = 0; t < given_.tokens; ++t) {
            if (heaviest_[t] == given_.top_k) continue;
            const std::size_t item = t * given_.top_k + heaviest_[t];
            kept_[item] = 1;
            ++load_[given_.device[item]];
        }
    }

    // The heaviest do not fit together. Finds the price of a hertz at which what pays for itself does, each token
    // keeping an assignment even if none pays. False where nothing that fits is found.
    bool squeeze() {
        auto [price, taken] = relaxed_choice();
        std::fill(kept_.begin(), kept_.end(), std::uint8_t{0});
        for (std::size_t k = 0; k < given_.devices; ++k) {
            for (std::size_t i = 0; i < taken[k]; ++i) kept_[all_.entries[all_.begin[k] + i].item] = 1;
        }
        load_ = taken;
        std::pair<std::vector<std::uint8_t>, std::vector<std::size_t>> found;
        double low = 0.0, high = kNever, rise = detail::kPriceRise;
        for (int step = 0; step < detail::kPriceSteps && price > 0.0 && high > low * detail::kPriceClose; ++step) {
            settle(1.0, price, 1);
            if (fit()) {
                high = price;
                found = {kept_, load_};
                if (hertz() >= detail::kWellUsed * total_hz_) break;
            } else {
                low = price;
            }
            price = low == 0.0 ? 0.5 * price : high == kNever ? rise * price : std::sqrt(low * high);
            rise *= rise;
        }
        if (high < kNever) {
            std::tie(kept_, load_) = found;
            return true;
        }
        settle(0.0, 1.0, 8);  // the cheapest on the air
        return fit();
    }

    // Token after token keeps what gains `factor` weight - price x hertz as things stand, or what loses least. Each
    // change raises the sum of that over all tokens, so the passes come to rest.
    void settle(double factor, double price, int passes) {
        for (bool moved = true; moved && passes > 0; --passes) {
            moved = false;
            for (std::size_t t = 0; t < given_.tokens; ++t) {
                if (heaviest_[t] < given_.top_k) moved = settle_token(t * given_.top_k, factor, price) || moved;
            }
        }
    }

    // Whether it changed what is kept.
    bool settle_token(std::size_t at, double factor, double price) {
        double most = -kNever;
        std::size_t best = heaviest_[at / given_.top_k], changes = 0, number = 0;
        bool had_best = false;
        for (std::size_t j = 0; j < given_.top_k; ++j) {
            const std::int32_t device = given_.device[at + j];
            if (device < 0) continue;
            std::size_t& load = load_[device];
            const bool had = kept_[at + j] != 0;
            load -= had ? 1 : 0;
            const double value = factor * given_.weight[at + j] -
                                 price * (table_.soft(device, load + 1) - table_.soft(device, load));
            const bool pays = value > 0.0;
            load += pays ? 1 : 0;
            kept_[at + j] = pays;
            changes += had != pays ? 1 : 0;
            number += pays ? 1 : 0;
            if (value > most) most = value, best = j, had_best = had;
        }
        if (number > 0) return changes > 0;
        kept_[at + best] = 1;
        ++load_[given_.device[at + best]];
        return !had_best || changes > 1;
    }

    // Token after token exchanges what it keeps for something heavier, where the hertz that are left allow it.
    void exchange() {
        double left_hz = total_hz_ - hertz();
        for (std::size_t at = 0; at < kept_.size(); at += given_.top_k) {
            for (std::size_t a = at; a < at + given_.top_k; ++a) {
                for (std::size_t b = at; b < at + given_.top_k && kept_[a] != 0; ++b) {
                    if (kept_[b] != 0 || given_.device[b] < 0 || !(given_.weight[b] > given_.weight[a])) continue;
                    std::size_t &from = load_[given_.device[a]], &to = load_[given_.device[b]];
                    const double freed = table_.soft(given_.device[a], from) - table_.soft(given_.device[a], from - 1);
                    --from;
                    const double hertz = table_.soft(given_.device[b], to + 1) - table_.soft(given_.device[b], to);
                    if (hertz - freed <= left_hz) {
                        left_hz -= hertz - freed;
                        kept_[a] = 0;
                        kept_[b] = 1;
                        ++to;
                    } else {
                        ++from;
                    }
                }
            }
        }
    }

    void split_rest() {
        rest_.begin.assign(1, 0);
        rest_.entries.resize(all_.entries.size() + 1);
        std::size_t count = 0;
        for (std::size_t k = 0; k < given_.devices; ++k) {
            for (std::size_t i = all_.begin[k]; i < all_.begin[k + 1]; ++i) {
                rest_.entries[count] = all_.entries[i];  // without a branch: who stays is hard to predict
                count += 1 - kept_[all_.entries[i].item];
            }
            rest_.begin.push_back(count);
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
    std::copy(chooser.kept().begin(), chooser.kept().end(), kept);
    return {fits ? chooser.bound_of_table() : 0.0, 0.0, fits};
}

// The least budget within which `goal` is kept: between lower_bound_s, below which it is not even conceivable, and
// `most_s`, within which everything fits.
inline BudgetAnswer choose_least_budget(const Assignments& given, const double* links, bool flat, double total_hz,
                                        double goal, double most_s, std::uint8_t* kept) {
    BudgetChooser chooser(given, links, flat, total_hz);
    double bound_s = 0.0, high = most_s;
    while (high - bound_s > detail::kBudgetClose * high && high > detail::kShortest) {
        const double middle = 0.5 * (bound_s + high);
        (chooser.upper_bound(middle) >= goal ? high : bound_s) = middle;
    }
    const auto enough = [&](double budget_s) { return chooser.choose(budget_s) && chooser.weight() >= goal; };
    // The least is most often just above its bound: away from there in growing steps, then back by halves.
    double low = bound_s, best_s = bound_s * (1.0 + detail::kFirstStep);
    for (double step = detail::kFirstStep; best_s < most_s && best_s > 0.0 && !enough(best_s); step *= 4.0) {
        low = best_s;
        best_s = bound_s * (1.0 + 4.0 * step);
    }
    best_s = best_s > 0.0 ? std::min(best_s, most_s) : most_s;
    while (best_s - low > detail::kGapClose * (best_s - bound_s) && best_s - low > detail::kBudgetClose * best_s) {
        const double middle = 0.5 * (low + best_s);
        (enough(middle) ? best_s : low) = middle;
    }
    chooser.choose(best_s);
    std::copy(chooser.kept().begin(), chooser.kept().end(), kept);
    return {chooser.bound_of_table(), bound_s, true};
}

}  // namespace wdmoe
