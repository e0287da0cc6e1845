// How many hertz a device needs to be in time: the inverse of the link's latency. Knows nothing of Python.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "link_time.hpp"

namespace wdmoe {

inline constexpr double kNever = std::numeric_limits<double>::infinity();

// links (5, devices), see BandwidthTask; token_s (n,) > 0 -> out (devices, n) hertz at which one token takes that long;
// infinite where no band is enough, 0 where none is needed.
inline void needed_hz(const double* links, std::size_t devices, bool flat, const double* token_s, std::size_t n,
                      double* out) {
    constexpr double edge = 1e-9;  // nearer than this to what infinite bandwidth takes counts as out of reach
    for (std::size_t k = 0; k < devices; ++k) {
        const LinkTime link = link_of(links, devices, k, flat, 1.0);
        const double shortest_s = link.limit() * (1.0 + edge);
        double band = 0.0, last_s = 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            const double air_s = token_s[i] - links[4 * devices + k];
            double& hertz = out[k * n + i];
            if (link.is_free()) {
                hertz = air_s >= 0.0 ? 0.0 : kNever;
            } else if (!(air_s > shortest_s) || !(link.flat < kNever)) {
                hertz = kNever;
            } else {
                const double start = band > 0.0 ? band * last_s / air_s : link.guess(air_s);
                hertz = band = link.band_for(air_s, start, 0.0, kNever);
                last_s = air_s;
            }
        }
    }
}

// h_k(n): hertz that device k needs to compute n tokens within a budget, if all the band were its own at most. Found
// when asked for, because a choice needs few of them.
class HertzTable {
public:
    // most (devices,): the tokens of each device at most.
    HertzTable(const double* links, std::size_t devices, bool flat, double total_hz,
               const std::vector<std::size_t>& most)
        : total_hz_(total_hz), begin_(devices), fastest_s_(devices), compute_s_(devices), near_(devices) {
        std::size_t size = 0;
        for (std::size_t k = 0; k < devices; ++k) {
            begin_[k] = size;
            size += most[k] + 1;
            link_.push_back(link_of(links, devices, k, flat, 1.0));
            fastest_s_[k] = link_[k].is_free() ? 0.0 : link_[k].time(total_hz);
            compute_s_[k] = links[4 * devices + k];
        }
        hertz_.resize(size);
    }

    // Forgets what was found for another budget.
    void begin(double budget_s) {
        budget_s_ = budget_s;
        std::fill(hertz_.begin(), hertz_.end(), kUnknown);
        std::fill(near_.begin(), near_.end(), Near{0.0, 0.0});
    }

    // Whether the device could do it with the whole band: `at` is finite.
    bool can(std::size_t k, std::size_t n) const { return n == 0 || air_s(k, n) >= fastest_s_[k]; }

    double at(std::size_t k, std::size_t n) {
        if (n == 0) return 0.0;
        double& hertz = hertz_[begin_[k] + n];
        if (hertz == kUnknown) hertz = find(k, n);
        return hertz;
    }

    // The same, but finite: what no band is enough for costs a whole band each, so that a search can leave it behind.
    double soft(std::size_t k, std::size_t n) {
        const double hertz = at(k, n);
        return hertz < kNever ? hertz : total_hz_ * static_cast<double>(n + 1);
    }

private:
    struct Near {
        double band, air_s;
    };
    static constexpr double kUnknown = -1.0;

    double total_hz_, budget_s_ = 0.0;
    std::vector<std::size_t> begin_;
    std::vector<LinkTime> link_;
    std::vector<double> fastest_s_, compute_s_, hertz_;
    std::vector<Near> near_;  // the last one found, where the next search begins

    double air_s(std::size_t k, std::size_t n) const { return budget_s_ / static_cast<double>(n) - compute_s_[k]; }

    double find(std::size_t k, std::size_t n) {
        if (!can(k, n)) return kNever;
        if (link_[k].is_free()) return 0.0;
        const double wanted_s = air_s(k, n);
        const Near near = near_[k];
        const double start = near.band > 0.0 ? near.band * near.air_s / wanted_s : link_[k].guess(wanted_s);
        const double band = link_[k].band_for(wanted_s, start, 0.0, total_hz_);
        near_[k] = {band, wanted_s};
        return band;
    }
};

}  // namespace wdmoe
