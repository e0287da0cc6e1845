// Bandwidth for least total latency: minimise sum_i max_k (load_ik t_k(band_k) + fixed_ik) under a total, floors and
// caps. What is asked, what is answered, the exact answer for one block, and the certificate. Knows nothing of Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "link_time.hpp"

namespace wdmoe {

enum BandwidthStatus : int { kOptimal = 0, kInfeasible = 1, kIterationLimit = 2 };

// All arrays are borrowed. Values are finite and not negative; the caller has checked them.
struct BandwidthTask {
    std::size_t blocks, devices;
    const double* load;          // (blocks, devices) tokens
    const double* fixed;         // (blocks, devices) seconds wherever there is load, or null
    const double* links;         // (5, devices) bits down, bits up, snr (or efficiency) down, up, seconds per token
    bool flat;                   // the links hold bit/s/Hz instead of received power over noise density
    double total_hz;             // > 0
    const double* floor_hz;      // (devices,) or null
    const double* cap_hz;        // (devices,) at least the floor, infinite where there is none; or null
    const double* start_hz;      // (devices,) of an earlier answer, or null
    const double* start_weight;  // (blocks, devices) of an earlier answer, or null
    double tolerance;            // relative gap between latency and lower bound
    std::size_t limit;           // iterations
};

struct BandwidthAnswer {
    double latency, lower_bound;
    double price;  // seconds saved by one more hertz
    int status;    // of `status_of`, and of nothing else
    std::size_t iterations;
};

// Whether the bound proves a latency to be the least, but for a relative gap.
inline bool is_closed(double latency, double lower_bound, double tolerance) {
    return std::isfinite(latency) && latency - lower_bound <= tolerance * latency;
}

// The one place that says what an answer is worth. It looks at the two numbers, never at the way they were found.
// Infeasible means proven so: even the bound is infinite.
inline int status_of(double latency, double lower_bound, double tolerance) {
    if (lower_bound == std::numeric_limits<double>::infinity()) return kInfeasible;
    return is_closed(latency, lower_bound, tolerance) ? kOptimal : kIterationLimit;
}

struct BandwidthArrays {
    double* band_hz;        // (devices,)
    double* block_latency;  // (blocks,)
    double* weight;         // (blocks, devices) multipliers: they sum to 1 in each block that has load
};

namespace detail {

// A band of less than this share of the total is not told from none; it changes the latency by less than 1e-12.
inline constexpr double kSmallestShare = 1e-15;
inline constexpr double kRounding = 1e-12;

// What is left to decide once idle blocks, idle devices and devices without a choice are gone. The band is counted in
// units of what those leave; columns are the devices that compete, and one more for what no band can shorten.
struct BandwidthCore {
    std::size_t rows = 0, columns = 0;  // columns without the extra one
    bool base_column = false;
    double unit_hz = 0.0;
    std::vector<std::size_t> block, device;  // where rows and columns stand in the task
    std::vector<std::size_t> base_device;    // (rows,) who sets the base
    std::vector<double> load, fixed;         // (rows, width)
    std::vector<double> base;                // (rows,)
    std::vector<double> given_hz;            // (devices of the task,) what those without a choice get
    std::vector<double> low, high;           // (columns,)
    std::vector<LinkTime> link;

    std::size_t width() const { return columns + (base_column ? 1 : 0); }
};

// What an answer in units of the core is.
struct CoreAnswer {
    std::vector<double> band;    // (columns,)
    std::vector<double> weight;  // (rows, width), each row sums to 1
    double price = 0.0;          // seconds per unit
    double latency = 0.0, lower_bound = 0.0;
    std::size_t iterations = 0;
};

class CoreBuilder {
public:
    explicit CoreBuilder(const BandwidthTask& task) : task_(task) {}

    double floor_of(std::size_t k) const { return task_.floor_hz == nullptr ? 0.0 : task_.floor_hz[k]; }
    double cap_of(std::size_t k) const { return task_.cap_hz == nullptr ? task_.total_hz : task_.cap_hz[k]; }
    double load_of(std::size_t i, std::size_t k) const { return task_.load[i * task_.devices + k]; }

    double fixed_of(std::size_t i, std::size_t k) const {
        const double own = task_.fixed == nullptr ? 0.0 : task_.fixed[i * task_.devices + k];
        return load_of(i, k) > 0.0 ? load_of(i, k) * task_.links[4 * task_.devices + k] + own : 0.0;
    }

    // False where no band can serve the load.
    bool build(BandwidthCore& core) {
        std::vector<char> loaded(task_.devices, 0), pinned(task_.devices, 0);
        for (std::size_t i = 0; i < task_.blocks; ++i) {
            bool costs = false;  // a block whose load costs nothing anywhere waits for nobody: nothing to decide
            for (std::size_t k = 0; k < task_.devices; ++k) {
                if (!(load_of(i, k) > 0.0)) continue;
                loaded[k] = 1;
                costs = costs || needs_band(k) || fixed_of(i, k) > 0.0;
            }
            if (costs) core.block.push_back(i);
        }
        core.rows = core.block.size();
        core.given_hz.assign(task_.devices, 0.0);
        double floors = 0.0, taken = 0.0, least = 0.0;
        bool starved = false;
        for (std::size_t k = 0; k < task_.devices; ++k) {
            const double low = floor_of(k), high = std::min(cap_of(k), task_.total_hz);
            floors += low;
            const bool needy = loaded[k] != 0 && needs_band(k);
            if (needy && (hopeless(k) || high <= 0.0)) return false;
            // a range that is narrower than what can be told apart is none
            pinned[k] = !needy || high <= std::max(low * (1.0 + kRounding), low + kSmallestShare * task_.total_hz);
            if (pinned[k]) {
                taken += core.given_hz[k] = needy ? std::max(low, high) : low;
            } else {
                core.device.push_back(k);
                least += low;
                starved = starved || low <= 0.0;
            }
        }
        core.columns = core.device.size();
        const double slack = kRounding * task_.total_hz;
        if (floors > task_.total_hz + slack || (starved && floors >= task_.total_hz - slack)) return false;
        // never nothing, not even where rounding takes what the floors leave
        core.unit_hz = core.columns == 0 ? task_.total_hz : std::max(task_.total_hz - taken, least);
        fill(core, pinned);
        return true;
    }

    // Seconds per token, the band in units.
    LinkTime link(std::size_t k, double unit_hz) const {
        return link_of(task_.links, task_.devices, k, task_.flat, unit_hz);
    }

private:
    const BandwidthTask& task_;

    bool needs_band(std::size_t k) const {
        return task_.links[k] > 0.0 || task_.links[task_.devices + k] > 0.0;
    }

    bool hopeless(std::size_t k) const {
        for (std::size_t d = 0; d < 2; ++d) {
            const double snr = task_.links[(2 + d) * task_.devices + k];
            if (task_.links[d * task_.devices + k] > 0.0 && !(snr > 0.0)) return true;
        }
        return false;
    }

    void fill(BandwidthCore& core, const std::vector<char>& pinned) {
        // Where nobody competes the base is the only column, also of a row in which it takes no time.
        core.base.assign(core.rows, core.columns == 0 ? -1.0 : 0.0);
        core.base_device.assign(core.rows, 0);
        for (std::size_t k = 0; k < task_.devices; ++k) {
            if (!pinned[k]) continue;
            // in hertz, whatever is left of it for the others
            const double hertz = core.given_hz[k], each = needs_band(k) && hertz > 0.0 ? link(k, 1.0).time(hertz) : 0.0;
            for (std::size_t r = 0; r < core.rows; ++r) {
                const double load = load_of(core.block[r], k);
                if (!(load > 0.0)) continue;
                const double seconds = load * each + fixed_of(core.block[r], k);
                if (seconds > core.base[r]) core.base[r] = seconds, core.base_device[r] = k, core.base_column = true;
            }
        }
        const std::size_t width = core.width();
        core.load.assign(core.rows * width, 0.0);
        core.fixed.assign(core.rows * width, 0.0);
        for (std::size_t r = 0; r < core.rows; ++r) {
            for (std::size_t c = 0; c < core.columns; ++c) {
                core.load[r * width + c] = load_of(core.block[r], core.device[c]);
                core.fixed[r * width + c] = fixed_of(core.block[r], core.device[c]);
            }
            if (core.base_column) core.fixed[r * width + core.columns] = core.base[r];
        }
        for (const std::size_t k : core.device) {
            core.link.push_back(link(k, core.unit_hz));
            core.low.push_back(std::max(floor_of(k) / core.unit_hz, kSmallestShare));
            const double cap = cap_of(k) / core.unit_hz;
            core.high.push_back(cap < 1.0 ? std::max(cap, core.low.back()) : 2.0);
        }
    }
};

// Sum over blocks of the slowest device, and which one that is where `slowest` is not null.
inline double core_latency(const BandwidthCore& core, const std::vector<double>& band, std::size_t* slowest = nullptr) {
    const std::size_t width = core.width();
    std::vector<double> each(width, 0.0);
    for (std::size_t c = 0; c < core.columns; ++c) each[c] = core.link[c].time(band[c]);
    double sum = 0.0;
    for (std::size_t r = 0; r < core.rows; ++r) {
        const double *load = &core.load[r * width], *fixed = &core.fixed[r * width];
        double worst = 0.0;
        for (std::size_t c = 0; c < width; ++c) {
            const double seconds = load[c] * each[c] + fixed[c];
            if (!(seconds <= worst) && !std::isnan(worst)) {  // NaN stays: the caller must see it
                worst = seconds;
                if (slowest != nullptr) slowest[r] = c;
            }
        }
        sum += worst;
    }
    return sum;
}

// Where `load` tokens and the band that they take cost least together, and what a next step would still save.
struct Priced {
    double band, doubt;
};

inline Priced band_at_price(const LinkTime& link, double load, double price, double low, double high, double hint) {
    Priced out{std::clamp(hint, low, high), 0.0};
    for (int step = 0; step < 60; ++step) {
        const LinkTime::Point p = link.at(out.band);
        const double pull = -load * p.slope;
        if (!(pull > 0.0)) return {low, out.doubt};
        // Newton on the logarithm of the pull, which is nearly straight in the logarithm of the band
        const double factor = std::clamp(1.0 + std::log(pull / price) * -p.slope / (out.band * p.bend), 0.1, 10.0);
        const double next = std::clamp(out.band * factor, low, high);
        const double moved = std::abs(next - out.band);
        out.band = next;
        out.doubt = load * p.bend * moved * moved * moved / out.band;  // second order in what a next step would move
        if (moved <= 1e-5 * out.band) break;
    }
    return out;
}

// The certificate. For any weights (rows, width) >= 0 whose rows sum to 1 and any price >= 0,
//     sum_i max_k (...)  >=  sum_ik w_ik fixed_ik + sum_k min over the band of (A_k t_k(b) + price b) - price,
// A_k = sum_i w_ik load_ik, because a maximum is at least any weighted mean and the bands sum to at most 1.
// Normalises `weight`, after taking it off pairs without load. `hint` (columns,) is where each minimum is looked for.
inline double core_lower_bound(const BandwidthCore& core, std::vector<double>& weight, double price,
                               const std::vector<double>& hint) {
    const std::size_t width = core.width();
    std::vector<double> mean(width, 0.0);
    double bound = 0.0, magnitude = price;
    for (std::size_t r = 0; r < core.rows; ++r) {
        double* mine = &weight[r * width];
        const double *load = &core.load[r * width], *fixed = &core.fixed[r * width];
        double sum = 0.0;
        for (std::size_t c = 0; c < width; ++c) {
            if (load[c] == 0.0 && fixed[c] == 0.0) mine[c] = 0.0;
            sum += mine[c];
        }
        if (!(sum > 0.0)) continue;
        for (std::size_t c = 0; c < width; ++c) {
            mine[c] /= sum;
            mean[c] += mine[c] * load[c];
            bound += mine[c] * fixed[c];
        }
    }
    magnitude += bound;
    for (std::size_t c = 0; c < core.columns; ++c) {
        const Priced at = band_at_price(core.link[c], mean[c], price, core.low[c], core.high[c], hint[c]);
        const double term = mean[c] * core.link[c].time(at.band) + price * at.band;
        bound += term - at.doubt;
        magnitude += term;
    }
    bound -= price;
    return std::max(bound - kRounding * magnitude, 0.0);
}

// Makes bands that nearly sum to 1 do so at most: what is above the floors shrinks, or all grow towards their caps.
inline void fit(const BandwidthCore& core, std::vector<double>& band) {
    double sum = 0.0, room = 0.0;
    for (std::size_t c = 0; c < core.columns; ++c) sum += band[c], room += band[c] - core.low[c];
    for (std::size_t c = 0; c < core.columns; ++c) {
        if (sum < 1.0) band[c] = std::min(band[c] / sum, core.high[c]);
        else if (room > 0.0) band[c] = core.low[c] + std::max(0.0, 1.0 - (sum - 1.0) / room) * (band[c] - core.low[c]);
    }
}

// The bands, and the latency that they have.
inline void set_bands(const BandwidthCore& core, const std::vector<double>& band, CoreAnswer& answer) {
    answer.band = band;
    answer.latency = core_latency(core, band);
}

// Nobody ends sooner than with all the band that the others' floors leave, so each row takes at least as long as the
// slowest of them would. Weight 1 on that one, at no price, is the proof. It is exact where a cap decides, or what no
// band shortens. Taken where it says more than the bound that is there.
inline void bound_alone(const BandwidthCore& core, CoreAnswer& answer) {
    const std::size_t width = core.width();
    double lows = 0.0;
    for (const double low : core.low) lows += low > kSmallestShare ? low : 0.0;
    std::vector<double> most(core.columns);
    for (std::size_t c = 0; c < core.columns; ++c) {
        const double own = core.low[c] > kSmallestShare ? core.low[c] : 0.0;
        most[c] = std::min(core.high[c], std::max(1.0 - (lows - own), core.low[c]));
    }
    std::vector<std::size_t> slowest(core.rows, 0);
    const double bound = core_latency(core, most, slowest.data()) * (1.0 - kRounding);
    if (!(bound > answer.lower_bound || answer.weight.empty())) return;
    answer.lower_bound = std::min(bound, answer.latency);
    answer.price = 0.0;
    answer.weight.assign(core.rows * width, 0.0);
    for (std::size_t r = 0; r < core.rows; ++r) {
        const std::size_t at = r * width + slowest[r];
        if (core.load[at] > 0.0 || core.fixed[at] > 0.0) answer.weight[at] = 1.0;  // else it takes no time at all
    }
}

// One block: all devices that compete finish together, at the time at which the bands they need sum to 1.
class OneBlock {
public:
    OneBlock(const BandwidthCore& core, double tolerance)
        : core_(core), tolerance_(tolerance), band_(core.columns) {}

    void solve(CoreAnswer& answer) {
        const double share = share_of_rest();
        double least = core_.base[0], most = core_.base[0];
        bool may_stop = core_.base_column;
        for (std::size_t c = 0; c < core_.columns; ++c) {
            may_stop = may_stop || core_.high[c] < 1.0;
            least = std::max(least, finish(c, std::min(core_.high[c], 1.0)));
            band_[c] = std::min(core_.high[c], core_.low[c] + share);
            most = std::max(most, finish(c, band_[c]));
        }
        if (may_stop && need(least) <= 1.0) {  // a cap decides, or what no band shortens
            set_bands(core_, band_, answer);  // its bound is `bound_alone`
            return;
        }
        double time = most;
        for (answer.iterations = 1; answer.iterations < 100; ++answer.iterations) {
            const double sum = need(time);
            (sum > 1.0 ? least : most) = time;
            if (std::abs(sum - 1.0) <= 1e-13 || !(most - least > 1e-15 * most)) break;
            // Newton on 1 / need, which is concave where no end of a range is met
            const double next = slope_ < 0.0 ? time + sum * (sum - 1.0) / -slope_ : most;
            time = next > least && next < most ? next : 0.5 * (least + most);
        }
        finish_answer(answer);
        // Where the times hardly depend on the bands, rounding is all that is left of a search for bands that sum to 1,
        // and to make them fit costs time. A little later they do fit.
        for (const double later : {1e-13, 1e-11, 0.25 * tolerance_}) {
            if (is_closed(answer.latency, answer.lower_bound, tolerance_)) return;
            if (need(most * (1.0 + later)) <= 1.0) finish_answer(answer);
        }
    }

private:
    const BandwidthCore& core_;
    const double tolerance_;
    std::vector<double> band_;
    double slope_ = 0.0;  // of the need by the time

    double finish(std::size_t c, double band) const {
        return core_.load[c] * core_.link[c].time(band) + core_.fixed[c];
    }

    double share_of_rest() const {
        double rest = 1.0;
        for (const double low : core_.low) rest -= low;
        return std::max(rest, 0.0) / static_cast<double>(core_.columns);
    }

    // Sum of the bands that finish all by `time`; leaves them in band_.
    double need(double time) {
        double sum = 0.0;
        slope_ = 0.0;
        for (std::size_t c = 0; c < core_.columns; ++c) {
            const double low = core_.low[c], high = core_.high[c], each = (time - core_.fixed[c]) / core_.load[c];
            if (!(each > 0.0)) {
                band_[c] = high;
            } else {
                band_[c] = core_.link[c].band_for(each, band_[c], low, high);
                const double steep = core_.load[c] * core_.link[c].at(band_[c]).slope;
                if (band_[c] > low && band_[c] < high && steep < 0.0) slope_ += 1.0 / steep;
            }
            sum += band_[c];
        }
        return sum;
    }

    // Makes the present bands fit, and proves what they are worth; keeps the best of each.
    void finish_answer(CoreAnswer& answer) {
        fit(core_, band_);
        const double latency = core_latency(core_, band_);
        if (answer.band.empty() || latency < answer.latency) set_bands(core_, band_, answer);
        // At the optimum the weight of a device is one over how steeply its time falls: all bands have one price.
        const double unit = *std::max_element(core_.load.begin(), core_.load.end());  // no reciprocal of a tiny load
        double steep = 0.0;
        std::vector<double> weight(core_.width(), 0.0);
        for (std::size_t c = 0; c < core_.columns; ++c) {
            const bool waits = finish(c, band_[c]) < latency * (1.0 - 1e-9);
            if (waits) continue;
            weight[c] = -1.0 / (core_.load[c] / unit * core_.link[c].at(band_[c]).slope);
            steep += weight[c];
        }
        if (!(steep > 0.0 && steep < 1e300)) return;  // times so short that no such certificate can be computed
        const double price = unit / steep, bound = core_lower_bound(core_, weight, price, band_);
        if (!std::isfinite(bound) || (bound <= answer.lower_bound && !answer.weight.empty())) return;
        answer.lower_bound = bound;
        answer.weight = weight;
        answer.price = price;
    }
};

}  // namespace detail
}  // namespace wdmoe
